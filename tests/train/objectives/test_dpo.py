"""The losses of pairs: against their formulas in NumPy, and whatever the batch, its padding and its placement."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import DpoConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import MeshPlacement, Placement
from gpt_jax.train.logprobs import token_logprobs
from gpt_jax.train.objectives.dpo import Reference, make_dpo, preference_loss
from tests import tiny
from tests.train.objectives.steps import (
    MODEL,
    assert_alike,
    finite_differences,
    initial_params,
    one_step,
    padded,
)

own_logprobs = jax.jit(functools.partial(token_logprobs, MODEL))

configs = st.one_of(
    st.builds(
        DpoConfig,
        loss=st.sampled_from(["sigmoid", "sigmoid_norm"]),
        beta=st.sampled_from([0.01, 0.1, 0.5]),
        label_smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    ),
    st.builds(DpoConfig, loss=st.just("ipo"), beta=st.sampled_from([0.05, 0.1, 1.0])),
)


def reference_loss(config: DpoConfig, drifts_B2: np.ndarray, lengths_B2: np.ndarray) -> np.ndarray:
    """The formulas of the papers, pair by pair, in float64."""
    losses = []
    for (chosen, rejected), (n_chosen, n_rejected) in zip(drifts_B2, lengths_B2, strict=True):
        if config.loss != "sigmoid":
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        if config.loss == "ipo":
            losses.append((chosen - rejected - 1 / (2 * config.beta)) ** 2)
            continue
        p = 1 / (1 + np.exp(-config.beta * (chosen - rejected)))
        losses.append(-(1 - config.label_smoothing) * np.log(p) - config.label_smoothing * np.log(1 - p))
    return np.array(losses)


@given(configs, st.integers(0, 2**31))
def test_losses_are_those_of_the_papers(config: DpoConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drifts, lengths = rng.normal(0, 5, (6, 2)), rng.integers(1, 40, (6, 2)).astype(float)
    ours = preference_loss(config, jnp.float32(drifts), jnp.float32(lengths))[0]
    expected = reference_loss(config, drifts, lengths)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda d: preference_loss(config, d, jnp.float32(lengths))[0].sum())(jnp.float32(drifts))
    numeric = finite_differences(lambda d: reference_loss(config, d, lengths).sum(), drifts)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)


def pair_batch(n_pairs: int = 4, seed: int = 0) -> Batch:
    """Pairs of random tokens, with prompts and answers of several lengths, and random references."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, tiny.GPT2.vocab_size, (n_pairs, 2, 25), dtype=np.int32)
    mask = np.zeros((n_pairs, 2, 24), bool)
    for row in mask.reshape(-1, 24):
        start, end = sorted(rng.choice(24, 2, replace=False))
        row[start : end + 1] = True
    return Batch(tokens, mask, extra=Reference(rng.normal(-20, 2, (n_pairs, 2)).astype(np.float32)))


def with_own_reference(batch: Batch) -> Batch:
    """The batch with the log-probabilities of the model itself."""
    said = jnp.sum(own_logprobs(initial_params(), batch), axis=2)
    return batch._replace(extra=Reference(np.asarray(said)))


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_the_first_loss_is_ln_2(loss: Any) -> None:
    _, metrics = one_step(make_dpo(DpoConfig(loss=loss)), with_own_reference(pair_batch()))
    assert metrics.loss == pytest.approx(np.log(2), abs=1e-6)
    assert metrics.logged["accuracy"] == 0.5
    assert metrics.logged["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics.logged["chosen_drift"] == pytest.approx(0, abs=1e-5)


def test_a_step_makes_chosen_answers_more_probable() -> None:
    batch = with_own_reference(pair_batch())
    params, _ = one_step(make_dpo(DpoConfig()), batch)
    before, after = (np.asarray(own_logprobs(p, batch)).sum(axis=2) for p in (initial_params(), params))
    drift = after - before
    assert (drift[:, 0] > drift[:, 1]).all()


def test_what_is_logged_is_of_the_pairs() -> None:
    batch = pair_batch()
    _, metrics = one_step(make_dpo(DpoConfig(sft_weight=0.5)), batch)
    said = np.asarray(own_logprobs(initial_params(), batch), np.float64).sum(axis=2)
    drift = said - batch.extra.logprobs
    expected = {
        "accuracy": np.mean(drift[:, 0] > drift[:, 1]),
        "margin": 0.1 * np.mean(drift[:, 0] - drift[:, 1]),
        "chosen_logprob": said[:, 0].mean(),
        "rejected_logprob": said[:, 1].mean(),
        "chosen_drift": drift[:, 0].mean(),
        "rejected_drift": drift[:, 1].mean(),
    }
    assert_alike(metrics.logged, expected)
    nats_a_token = -said[:, 0] / batch.mask[:, 0].sum(axis=1)
    lengths = batch.mask.sum(axis=2)
    loss = reference_loss(DpoConfig(), drift, lengths).mean() + 0.5 * nats_a_token.mean()
    assert metrics.loss == pytest.approx(loss, rel=1e-5)


def test_placements_padding_and_empty_pairs_do_not_matter() -> None:
    """One device and microbatches, pmap, a mesh; rows that are longer than they need to be; a pair without a target."""
    batch, objective = pair_batch(), make_dpo(DpoConfig(sft_weight=0.1))
    expected = one_step(objective, batch)
    assert not np.allclose(expected[0]["tokens_VD"], initial_params()["tokens_VD"], atol=1e-3)
    assert_alike(one_step(objective, batch, n_micro=4), expected)
    assert_alike(one_step(objective, batch, Placement(jax.devices()[:2]), n_micro=2), expected)
    mesh = MeshPlacement(jax.devices()[:4], ParallelConfig(fsdp=2, tensor=2), MODEL.config)
    assert_alike(one_step(objective, batch, mesh), expected)
    assert_alike(one_step(objective, padded(batch, 7)), expected)
    more = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), batch)
    more.mask[-1] = False
    assert_alike(one_step(objective, more), expected)


def test_prompts_are_not_learnt() -> None:
    """Tokens after the last target change nothing."""
    batch, objective = pair_batch(), make_dpo(DpoConfig())
    other = batch._replace(tokens=batch.tokens.copy(), mask=batch.mask.copy())
    for tokens, mask in zip(other.tokens.reshape(-1, 25), other.mask.reshape(-1, 24), strict=True):
        tokens[np.flatnonzero(mask)[-1] + 2 :] = 3
    assert_alike(one_step(objective, other), one_step(objective, batch), 0)


def test_dropout_is_of_each_row() -> None:
    """Of a pair, each answer has its own, and no other pair changes it."""
    config = dataclasses.replace(MODEL.config, dropout=0.5)
    batch = pair_batch()
    keys = jax.random.split(jax.random.key(0), 4)
    logprobs = jax.jit(functools.partial(token_logprobs, GPT(config)))
    whole = np.asarray(logprobs(initial_params(), batch, keys))
    part = jax.tree.map(lambda x: x[2:3], batch)
    np.testing.assert_allclose(logprobs(initial_params(), part, keys[2:3]), whole[2:3], rtol=1e-5)
    same = batch._replace(tokens=np.repeat(batch.tokens[:, :1], 2, axis=1), mask=np.ones_like(batch.mask))
    both = np.asarray(logprobs(initial_params(), same, keys))
    assert not np.allclose(both[:, 0], both[:, 1])
