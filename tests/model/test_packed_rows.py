"""Rows that the data layer packs, through the model: each document is as if it were alone."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import AttentionName, ModelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.data.packing import PackedRows, pack
from gpt_jax.model import kernels
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD
from gpt_jax.train.objectives.next_token import next_token
from tests import tiny
from tests.data.splits import Split
from tests.model.test_segments import on_cpu  # noqa: F401

T = 128  # The shortest for Splash.
GPT2, LLAMA, GEMMA = (
    dataclasses.replace(config, vocab_size=61, context_length=T) for config in (tiny.GPT2, tiny.LLAMA, tiny.GEMMA)
)


def make_split(rng: np.random.Generator, kind: str) -> Split:
    """Documents of random tokens: texts, some longer than a row, or conversations with half of the tokens learnt."""
    lengths = rng.integers(20, 60, 8)
    split = Split(
        [300, 129, *lengths.tolist()] if kind == "texts" else [(rng.random(n) < 0.5).tolist() for n in lengths]
    )
    split.ids = rng.integers(0, 61, len(split.ids), dtype=np.int32)
    return split


def packed_batch(split: Split) -> Batch:
    """All packed rows of a split."""
    rows = PackedRows(split, pack(split, T))
    return Batch(*(np.stack(field) for field in zip(*(rows.row(i, 0)[:4] for i in range(len(rows))), strict=True)))


def alone(split: Split) -> Batch:
    """Each document at the beginning of a row of its own; of a long text, each window."""
    starts, rows = [*split.document_starts.astype(int).tolist(), len(split)], []
    for start, end in itertools.pairwise(starts):
        for first in range(start, end - 1, T):
            n = min(T + 1, end - first)
            tokens, mask = split.ids[first : first + n], split.mask[first + 1 : first + n]
            rows.append((np.pad(tokens, (0, T + 1 - n)), np.pad(mask, (0, T + 1 - n))))
    return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))


@functools.cache
def mean_and_gradient(config: ModelConfig) -> Any:
    """A compiled function of parameters and a batch: the mean loss, and its gradient."""

    def mean(params: Params, batch: Batch) -> jax.Array:
        sums = next_token(GPT(config), params, batch, None)
        return sums.numerator / sums.denominator

    return jax.jit(jax.value_and_grad(mean))


@pytest.mark.parametrize("kind", ["texts", "conversations"])
@pytest.mark.parametrize("config", [GPT2, pytest.param(GEMMA, marks=pytest.mark.exhaustive)])
def test_packed_documents_are_as_if_alone(rng: np.random.Generator, config: ModelConfig, kind: str) -> None:
    """Loss and gradient of all targets, packed and document by document."""
    split = make_split(rng, kind)
    params, packed, each = tiny.random_params(config), packed_batch(split), alone(split)
    assert len(packed.tokens) < len(each.tokens)
    assert packed.mask.sum() == each.mask.sum() > 0
    loss, grads = mean_and_gradient(config)(params, packed)
    expected, expected_grads = mean_and_gradient(config)(params, each)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), grads, expected_grads)


@pytest.mark.parametrize("attention", ["xla", "block_causal", "cudnn", "splash"])
def test_neighbours_change_nothing(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: Any,  # noqa: F811
    attention: AttentionName,
) -> None:
    """Not one bit of the logits of the other documents, nor of the gradient of their loss, with padding at the end."""
    monkeypatch.setattr(kernels, "causal_by_splash", functools.partial(kernels.causal_by_splash, interpret=True))
    config = dataclasses.replace(LLAMA, attention=attention)
    split, params = Split([50, 40, 30]), tiny.random_params(config)
    split.ids = rng.integers(0, 61, len(split.ids), dtype=np.int32)
    batch = packed_batch(split)
    assert np.unique(batch.segments).tolist() == [0, 1, 2, 3]

    @jax.jit
    def logits_and_gradient(batch: Batch, others: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            return next_token(GPT(config), params, batch._replace(mask=batch.mask & others), None).numerator

        hidden_BTD = forward(GPT(config), params, batch.tokens[:, :-1], None, batch.segments, batch.positions)
        return hidden_BTD @ head_VD(params).T, jax.grad(loss)(params)

    for changed in range(4):
        here = batch.segments == changed
        tokens = batch.tokens.copy()
        tokens[:, :-1][here] = (tokens[:, :-1][here] + 1 + rng.integers(0, 60, here.sum())) % 61
        logits, grads = logits_and_gradient(batch, jnp.asarray(~here))
        new_logits, new_grads = logits_and_gradient(batch._replace(tokens=tokens), jnp.asarray(~here))
        assert np.array_equal(np.asarray(logits)[~here], np.asarray(new_logits)[~here])
        assert not np.array_equal(np.asarray(logits)[here], np.asarray(new_logits)[here])
        assert all(np.any(grad) for grad in jax.tree.leaves(grads))
        jax.tree.map(np.testing.assert_array_equal, grads, new_grads)
