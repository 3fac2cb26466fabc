"""Log-probabilities of windows of text under a model, on one device or on several."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.errors import UserError
from gpt_jax.evaluate.windows import Window, batches
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.kernels import SPLASH_BLOCKS
from gpt_jax.model.loss import nats_N
from gpt_jax.placement import Placement

CHUNK = 1024
"""Tokens that have logits at one time: they fill matrix units, and take 200 MB with a vocabulary of 50,000 tokens."""


class Score(NamedTuple):
    """The score of one window: its scored tokens under the model."""

    number: int  # The number of the window, from 0.
    nats: float  # -log of their probability.
    greedy: bool  # True when each of them is the most probable one.


def make_score_step(model: GPT, axis_name: str | None) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """The scoring step: `(params, batch)` to the nats and greediness of each row of the whole batch, (B,) each.

    batch: this device's share, with a mask. Nats are float32, greediness is bool.
    """

    def score_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens, mask_BT = batch.tokens, batch.mask
        hidden_BTD = forward(model, params, tokens[:, :-1], None, batch.segments, batch.positions)

        def score_token(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_D, target = x
            logits_1V = logits_NV(model, params, hidden_D[None])
            return nats_N(logits_1V, target[None])[0], jnp.argmax(logits_1V) == target

        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), tokens[:, 1:].reshape(-1)
        nats_BT, greedy_BT = (x.reshape(mask_BT.shape) for x in jax.lax.map(score_token, flat, batch_size=CHUNK))
        scores = jnp.sum(nats_BT, axis=1, where=mask_BT), jnp.all(greedy_BT, axis=1, where=mask_BT)
        return scores if axis_name is None else jax.lax.all_gather(scores, axis_name, tiled=True)

    return score_step


class Scorer:
    """A model ready to score. Each device holds all parameters, and scores `batch_size` windows at one time."""

    def __init__(self, model: GPT, params: Params, devices: Sequence[jax.Device], batch_size: int) -> None:
        self.model = model
        self.placement = Placement(devices)
        self.params = jax.device_put(params, self.placement.state_shardings(params))
        self.batch_size = batch_size * self.placement.n_devices
        self.step = self.placement.jit(make_score_step(model, self.placement.axis_name), donate=False)

    def __call__(self, windows: Iterable[Window]) -> Iterator[Score]:
        """The score of each window, as soon as windows of its length fill a batch. Raises UserError as `read` does."""
        previous: tuple[list[int], Any] = [], ()
        fused = self.model.config.attention in ("cudnn", "splash")  # They work on whole blocks.
        least = SPLASH_BLOCKS[-1] if fused else 16
        for numbers, batch in batches(windows, self.batch_size, self.model.config.context_length, least):
            result = self.step(self.params, self.placement.split(batch))
            if self.placement.must_wait:
                jax.block_until_ready(result)
            yield from read(*previous)  # While the devices work on the next batch.
            previous = numbers, result
        yield from read(*previous)


def read(numbers: list[int], result: tuple[jax.Array, jax.Array]) -> Iterator[Score]:
    """The scores of a batch, once the devices have them; its empty rows are left out.

    Raises UserError when one is not finite.
    """
    for number, nats, greedy in zip(numbers, *map(np.asarray, result), strict=False):
        if not np.isfinite(nats):
            raise UserError(f"the loss is {nats}: the model's parameters or what it computes are not finite")
        yield Score(number, float(nats), bool(greedy))
