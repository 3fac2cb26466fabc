"""Log-probabilities of windows of text under a model, on one device, on several, or on a mesh that divides it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gpt_jax.data.batch import Batch
from gpt_jax.errors import UserError
from gpt_jax.evaluate.windows import Window, batches
from gpt_jax.model.backend import least_length
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD, hide_padding
from gpt_jax.model.loss import nats_N
from gpt_jax.model.sharding import BATCH_AXES, mesh_is_set
from gpt_jax.model.weight import decoding_product
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
        nats_BT, greedy_BT = score_tokens(hidden_BTD, head_VD(params), tokens[:, 1:], model.config.vocab_size)
        scores = jnp.sum(nats_BT, axis=1, where=mask_BT), jnp.all(greedy_BT, axis=1, where=mask_BT)
        return scores if axis_name is None else jax.lax.all_gather(scores, axis_name, tiled=True)

    return score_step


def score_tokens(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """The nats of each target, float32 (B, T), and True where it is the most probable token, bool (B, T).

    On a mesh, each device does so with its tokens and its part of the vocabulary.
    """
    if not mesh_is_set():
        return scores_in_chunks(hidden_BTD, head_VD, targets_BT, vocab_size)
    on_one_device = functools.partial(scores_in_chunks, vocab_size=vocab_size, vocabulary_axis="tensor")
    tokens = PartitionSpec(BATCH_AXES, "context")
    in_specs = (tokens, PartitionSpec("tensor"), tokens)
    return jax.shard_map(on_one_device, in_specs=in_specs, out_specs=tokens)(hidden_BTD, head_VD, targets_BT)


def scores_in_chunks(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    vocab_size: int,
    vocabulary_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`score_tokens` of one device. vocabulary_axis: the mapped axis that divides the head's rows, if any."""

    def score(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_D, target = x
        logits_1V = decoding_product(hidden_D[None], head_VD.astype(hidden_D.dtype), jnp.float32)
        if vocabulary_axis is None:
            logits_1V = hide_padding(logits_1V, vocab_size)
            return nats_N(logits_1V, target[None])[0], jnp.argmax(logits_1V) == target
        first = jax.lax.axis_index(vocabulary_axis) * head_VD.shape[0]
        logits_1V = hide_padding(logits_1V, vocab_size, first)
        nats_1 = nats_N(logits_1V, target[None], first, vocabulary_axis)
        return nats_1[0], most_probable_N(logits_1V, first, vocabulary_axis)[0] == target

    flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    nats_BT, greedy_BT = (x.reshape(targets_BT.shape) for x in jax.lax.map(score, flat, batch_size=CHUNK))
    return nats_BT, greedy_BT


def most_probable_N(logits_NV: jax.Array, first: jax.Array, axis_name: str) -> jax.Array:
    """The most probable token, the first of equals, where each device of a mapped axis has the logits of a part of the
    vocabulary, from token `first` on."""
    highest_N = logits_NV.max(axis=-1)
    is_highest_N = highest_N == jax.lax.pmax(highest_N, axis_name)
    here_N = first + jnp.argmax(logits_NV, axis=-1)
    return jax.lax.pmin(jnp.where(is_highest_N, here_N, jnp.iinfo(here_N.dtype).max), axis_name)


class Scorer:
    """A model ready to score, with its parameters in a placement. Each of the shares that this divides a batch into has
    `batch_size` windows at one time; without a mesh, that is each device, which has all parameters."""

    def __init__(self, model: GPT, params: Params, placement: Placement, batch_size: int) -> None:
        self.model, self.placement = model, placement
        self.params = jax.device_put(params, placement.state_shardings(params))
        self.batch_size = batch_size * placement.n_shares
        self.step = placement.jit(make_score_step(model, placement.axis_name), donate=False)

    def __call__(self, windows: Iterable[Window]) -> Iterator[Score]:
        """The score of each window, as soon as windows of its length fill a batch. Raises UserError as `read` does."""
        previous: tuple[list[int], Any] = [], ()
        least = least_length(self.model.config) * self.placement.context
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
