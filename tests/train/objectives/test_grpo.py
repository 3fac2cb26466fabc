"""The losses of rewarded answers: against their formulas in NumPy, and whatever the batch and its placement."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import GrpoConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.placement import MeshPlacement, Placement
from gpt_jax.sample.filters import apply, row_filters
from gpt_jax.train.logprobs import token_logprobs
from gpt_jax.train.objectives.grpo import Rewarded, advantages, as_drawn, filters, make_grpo, policy_loss
from tests import tiny
from tests.cases import cases
from tests.train.objectives.steps import (
    MODEL,
    assert_alike,
    finite_differences,
    initial_params,
    one_step,
    padded,
)

V = tiny.GPT2.vocab_size
own_logprobs = jax.jit(functools.partial(token_logprobs, MODEL))

configs = st.builds(
    GrpoConfig,
    loss=st.sampled_from(["grpo", "dr_grpo", "dapo", "gspo"]),
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28]),
    kl_beta=st.sampled_from([0.0, 0.04, 1.0]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    max_new_tokens=st.just(9),
)


def reference_loss(config: GrpoConfig, logprobs: np.ndarray, mask: np.ndarray, rewarded: Rewarded) -> float:
    """The formulas of the papers, token by token, in float64."""
    answers, lengths = [], []
    for i in range(len(logprobs)):
        tokens = np.flatnonzero(mask[i]).tolist() if rewarded.counts[i] else []
        if not len(tokens):
            continue
        ratios = {t: np.exp(logprobs[i, t] - rewarded.old[i, t]) for t in tokens}
        if config.loss == "gspo":
            mean = np.exp(np.mean([logprobs[i, t] - rewarded.old[i, t] for t in tokens]))
            ratios = dict.fromkeys(tokens, mean)
        losses = []
        for t in tokens:
            A, r = float(rewarded.advantages[i]), ratios[t]
            loss = -min(r * A, float(np.clip(r, 1 - config.clip_low, 1 + config.clip_high)) * A)
            if config.kl_beta:
                d = logprobs[i, t] - rewarded.reference[i, t]
                loss += config.kl_beta * {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[config.kl_estimator]
            losses.append(loss)
        answers.append(losses)
        lengths.append(len(tokens))
    if not answers:
        return 0.0
    if config.loss == "dapo":
        return sum(map(sum, answers)) / sum(lengths)
    if config.loss == "dr_grpo":
        return sum(map(sum, answers)) / (len(answers) * config.max_new_tokens)
    return float(np.mean([np.mean(losses) for losses in answers]))


def random_answers(rng: np.random.Generator, kl_beta: float) -> tuple[np.ndarray, np.ndarray, Rewarded]:
    """Log-probabilities of five answers, the tokens that were drawn, and their rewards; none at the edge of a clip."""
    shape = (5, 6)
    logprobs = rng.normal(-2, 0.5, shape)
    mask = rng.random(shape) < 0.6
    old = logprobs + rng.choice([-0.6, -0.15, 0.0, 0.05, 0.13, 0.5], shape)
    return (
        logprobs,
        mask,
        Rewarded(
            rng.normal(size=5),
            rng.random(5) < 0.8,
            old + rng.normal(0, 0.01, shape),
            old,
            logprobs + rng.normal(0, 0.3, shape) if kl_beta else None,
        ),
    )


def as_float32(rewarded: Rewarded) -> Rewarded:
    return jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), rewarded)


@given(configs, st.integers(0, 2**31))
def test_losses_are_those_of_the_papers(config: GrpoConfig, seed: int) -> None:
    logprobs, mask, rewarded = random_answers(np.random.default_rng(seed), config.kl_beta)

    def loss(x: jax.Array) -> jax.Array:
        sums = policy_loss(config, x, jnp.asarray(mask), as_float32(rewarded))
        return sums.numerator / jnp.maximum(sums.denominator, 1e-9)

    ours, gradient = jax.value_and_grad(loss)(jnp.float32(logprobs))
    assert float(ours) == pytest.approx(reference_loss(config, logprobs, mask, rewarded), rel=1e-5, abs=1e-5)
    numeric = finite_differences(lambda x: reference_loss(config, x, mask, rewarded), logprobs)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)
    is_left_out = ~(mask & rewarded.counts[:, None])
    assert not np.asarray(gradient)[is_left_out].any()


@given(configs, st.integers(0, 2**31))
def test_on_policy_the_ratio_is_1_and_clipping_changes_nothing(config: GrpoConfig, seed: int) -> None:
    """Whether old log-probabilities are given or taken from the present."""
    logprobs, mask, rewarded = random_answers(np.random.default_rng(seed), config.kl_beta)
    x = jnp.float32(logprobs)
    results = []
    for old in (x, None):
        for clip in (1e-3, 0.2):
            clipped = dataclasses.replace(config, clip_low=clip, clip_high=clip)
            given_old = as_float32(rewarded)._replace(old=old)

            def loss(x: jax.Array, c: GrpoConfig = clipped, r: Rewarded = given_old) -> Any:
                sums = policy_loss(c, x, jnp.asarray(mask), r)
                return sums.numerator, sums

            (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(x)
            results.append((value, gradient))
            assert sums.logged["clipped"][0] == 0
    for other in results[1:]:
        np.testing.assert_allclose(other[0], results[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other[1], results[0][1], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5), st.integers(2, 6), st.sampled_from(["group", "batch", "none"]), st.integers(0, 2**31))
def test_advantages(P: int, G: int, scale: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 0.5, 1.0], (P, G))
    ours, has_spread = advantages(rewards, GrpoConfig(scale=scale))
    for i, group in enumerate(rewards):
        deviation = {"group": group.std(ddof=1) + 1e-4, "batch": rewards.std(ddof=1) + 1e-4, "none": 1.0}[scale]
        np.testing.assert_allclose(ours[i], (group - group.mean()) / deviation, rtol=1e-5, atol=1e-6)
        assert has_spread[i] == (len(set(group)) > 1)
        assert abs(ours[i].sum()) < 1e-3
    assert ours.dtype == np.float32


def answer_batch(seed: int = 0, P: int = 4, G: int = 2) -> Batch:
    """Answers of random tokens after prompts, with advantages, and log-probabilities near those of the model."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (P, G, 25), dtype=np.int32)
    mask = np.zeros((P, G, 24), bool)
    for row in mask.reshape(-1, 24):
        start, end = sorted(rng.choice(24, 2, replace=False))
        row[start : end + 1] = True
    said = np.asarray(own_logprobs(initial_params(), Batch(tokens, mask)))
    near = [(said + rng.normal(0, 0.3, said.shape)).astype(np.float32) for _ in range(3)]
    counts = np.ones((P, G), bool)
    counts[1] = False
    return Batch(tokens, mask, extra=Rewarded(rng.normal(size=(P, G)).astype(np.float32), counts, *near))


@pytest.mark.parametrize("loss", cases(["grpo", "dr_grpo", "dapo", "gspo"], ["dapo"]))
def test_placements_padding_and_what_is_left_out_do_not_matter(loss: Any) -> None:
    """One device and microbatches, pmap, a mesh; longer rows; a group that does not count, be it there or not, not
    even by its divergence from the reference."""
    batch = answer_batch()
    objective = make_grpo(GrpoConfig(loss=loss, kl_beta=0.1, max_new_tokens=24), V)
    expected = one_step(objective, batch)
    assert not np.allclose(expected[0]["tokens_VD"], initial_params()["tokens_VD"], atol=1e-3)
    assert expected[1].logged["sampler_difference"] > 0.1
    assert_alike(one_step(objective, batch, n_micro=4), expected)
    assert_alike(one_step(objective, batch, Placement(jax.devices()[:2]), n_micro=2), expected)
    mesh = MeshPlacement(jax.devices()[:4], ParallelConfig(fsdp=2, tensor=2), MODEL.config)
    assert_alike(one_step(objective, batch, mesh), expected)
    assert_alike(one_step(objective, padded(batch, 7)), expected)
    assert_alike(one_step(objective, jax.tree.map(lambda x: x[[0, 2, 3]], batch)), expected)


def test_the_largest_difference_is_reported_not_the_sum() -> None:
    batch = answer_batch()
    rewarded = batch.extra
    kept = batch.mask & rewarded.counts[:, :, None]
    largest = np.abs(np.asarray(rewarded.old) - rewarded.drawn)[kept].max()
    for placement, n_micro in ((None, 1), (None, 4), (Placement(jax.devices()[:4]), 1)):
        _, metrics = one_step(make_grpo(GrpoConfig(), V), batch, placement, n_micro)
        assert metrics.logged["sampler_difference"] == pytest.approx(largest, rel=1e-6)


def test_nothing_is_learnt_where_no_group_counts() -> None:
    batch = answer_batch()
    batch.extra.counts[:] = False
    params, metrics = one_step(make_grpo(GrpoConfig(kl_beta=1.0), V), batch)
    assert_alike(params, initial_params(), 0)
    assert metrics.loss == metrics.grad_norm == 0


def test_a_step_on_policy_goes_up_the_advantages() -> None:
    batch = answer_batch()
    batch = batch._replace(extra=batch.extra._replace(old=None, reference=None))
    params, metrics = one_step(make_grpo(GrpoConfig(), V), batch)
    before, after = (np.asarray(own_logprobs(p, batch)).sum(axis=2) for p in (initial_params(), params))
    counts = batch.extra.counts
    assert ((after - before) * batch.extra.advantages)[counts].sum() > 0
    assert metrics.logged["clipped"] == 0


@pytest.mark.parametrize("flags", [{"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 5, "temperature": 1.3}])
def test_the_loss_is_of_the_distribution_that_is_drawn_from(flags: dict[str, Any]) -> None:
    """Temperature and filters: as the sampler applies them, for each token that it could have drawn."""
    config, rng = GrpoConfig(**flags), np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (30, 50)), jnp.float32)
    row = row_filters(filters(config))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (30, *x.shape)), row)
    drawn_from = jax.nn.log_softmax(apply(rows, logits), axis=-1)
    targets = jnp.argmax(drawn_from + rng.gumbel(size=(30, 50)), axis=-1)
    adjust = as_drawn(config)
    assert adjust is not None
    ours = jax.nn.log_softmax(adjust(logits, targets), axis=-1)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(ours), np.asarray(targets)[:, None], 1),
        np.take_along_axis(np.asarray(drawn_from), np.asarray(targets)[:, None], 1),
        rtol=1e-5,
        atol=1e-5,
    )
    worst = jnp.argmin(logits, axis=-1)  # Which a filter excludes: its probability is small, but not 0.
    assert np.isfinite(jax.nn.log_softmax(adjust(logits, worst), axis=-1)[jnp.arange(30), worst]).all()

    def nats(x: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(adjust(x, targets), axis=-1)[jnp.arange(30), targets].sum()

    assert np.isfinite(jax.grad(nats)(logits)).all()
    assert as_drawn(GrpoConfig()) is None


def test_filters_in_the_step() -> None:
    """The objective with a filter equals itself without one where the filter keeps all tokens."""
    batch = answer_batch()
    plain = one_step(make_grpo(GrpoConfig(), V), batch)
    assert_alike(one_step(make_grpo(GrpoConfig(top_k=V), V), batch), plain)
    filtered = one_step(make_grpo(GrpoConfig(top_k=3), V), batch)
    assert np.isfinite(filtered[1].loss)
    assert filtered[1].loss != plain[1].loss
