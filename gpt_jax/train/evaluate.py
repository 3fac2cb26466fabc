"""The loss on the whole validation set during training."""

from collections.abc import Callable

import jax
import numpy as np

from gpt_jax.config import Config
from gpt_jax.data.folders import DataFolders
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.step import make_eval_step


def make_evaluate(
    model: GPT, placement: Placement, data: DataFolders, config: Config
) -> Callable[[Params], dict[str, float]]:
    """A function of the parameters that returns the loss on the whole validation set, in nats a token that is to be
    learnt, and bits a byte of their text.

    With several folders, these are means by the weights of the mixture at its first step, and the loss on each folder
    stands beside, as val_loss/NAME. Raises UserError when a set has no token to be predicted, or the batch does not
    divide over the devices.
    """
    T, weights = config.model.context_length, config.data.stages()[0][1]
    for name, folder in data.by_name.items():
        if not data.has_validation(folder, T):
            raise UserError(
                f"the validation split of {name} has {len(folder.val)} tokens, and none to be predicted in a window of "
                f"model.context_length + 1 = {T + 1}; prepare it with more text"
            )
    batch_size = eval_batch_size(config, placement)
    rows = placement.rows(batch_size)
    eval_step = placement.jit(make_eval_step(next_token, model, placement.axis_name), donate=False)

    def loss_on(name: str, params: Params) -> float:
        sums = []
        for batch in data.validation(name, T, batch_size):
            sums.append(eval_step(params, placement.split(jax.tree.map(lambda x: x[rows], batch)))[:2])
            if placement.must_wait:
                jax.block_until_ready(sums[-1])
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        return total / count

    def evaluate(params: Params) -> dict[str, float]:
        losses = {name: loss_on(name, params) for name in data.by_name}
        bits = [losses[name] * folder.val.tokens_per_byte / float(np.log(2)) for name, folder in data.by_name.items()]
        alone = len(losses) == 1
        return {
            "val_loss": float(np.average(list(losses.values()), weights=weights)),
            "val_bits_per_byte": float(np.average(bits, weights=weights)),
            **({} if alone else {f"val_loss/{name}": loss for name, loss in losses.items()}),
        }

    return evaluate


def eval_batch_size(config: Config, placement: Placement) -> int:
    """Rows that are evaluated at one time, over all devices. Raises UserError when they do not divide over these."""
    default = config.data.microbatch_size * placement.n_shares or config.data.batch_size
    batch_size = config.train.eval_batch_size or default
    if batch_size % placement.n_shares:
        raise UserError(
            f"train.eval_batch_size = {batch_size} does not divide over {placement.n_shares} {placement.shares_label}"
        )
    return batch_size
