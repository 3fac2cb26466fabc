"""The loss on the whole validation set during training."""

from collections.abc import Callable

import jax
import numpy as np

from gpt_jax.config import Config
from gpt_jax.data.loader import eval_batches
from gpt_jax.data.shards import Dataset
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.step import make_eval_step


def make_evaluate(
    model: GPT, placement: Placement, data: Dataset, config: Config
) -> Callable[[Params], dict[str, float]]:
    """A function of the parameters that returns the loss on the whole validation set, in nats a token and bits a byte.

    Raises UserError when the set has less than two tokens, or the batch does not divide over the devices.
    """
    if len(data.val) < 2:
        raise UserError(
            f"the validation split of {config.data.dir} has {len(data.val)} tokens; prepare it with more text"
        )
    default = config.data.microbatch_size * placement.n_shares or config.data.batch_size
    batch_size = config.train.eval_batch_size or default
    if batch_size % placement.n_shares:
        raise UserError(
            f"train.eval_batch_size = {batch_size} does not divide over {placement.n_shares} {placement.shares_label}"
        )
    rows = placement.rows(batch_size)
    eval_step = placement.jit(make_eval_step(next_token, model, placement.axis_name), donate=False)
    tokens_per_byte = len(data.val) / data.val.n_bytes

    def evaluate(params: Params) -> dict[str, float]:
        sums = []
        for batch in eval_batches(data.val, config.model.context_length, batch_size):
            sums.append(eval_step(params, placement.split(jax.tree.map(lambda x: x[rows], batch)))[:2])
            if placement.must_wait:
                jax.block_until_ready(sums[-1])
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        loss = total / count
        return {"val_loss": loss, "val_bits_per_byte": loss * tokens_per_byte / float(np.log(2))}

    return evaluate
