"""Each filter against a reference in NumPy, on generated logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpt_jax.errors import UserError
from gpt_jax.sample.filters import apply, draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition
from gpt_jax.sample.settings import Filters

# Distinct by a good margin: with ties, or sums at the edge of p, float32 and float64 may rightly disagree.
batches = st.integers(1, 4).flatmap(
    lambda b: st.lists(
        st.permutations(range(17)).map(lambda order: np.array(order, np.float32) * 0.37 - 2.9), min_size=b, max_size=b
    ).map(np.stack)
)


top_k = jax.jit(keep_top_k, static_argnames="k")
top_p = jax.jit(keep_top_p)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def by_row(reference: Callable[[np.ndarray], set[int]], logits: np.ndarray) -> np.ndarray:
    """The logits with -inf where the reference does not keep a token."""
    out = np.full_like(logits, -np.inf)
    for b, row in enumerate(logits):
        kept = list(reference(row))
        out[b, kept] = row[kept]
    return out


@given(batches, st.integers(1, 20))
def test_top_k(logits: np.ndarray, k: int) -> None:
    expected = by_row(lambda row: set(np.argsort(-row)[:k]), logits)
    np.testing.assert_array_equal(top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("k", [1, 7, 50, 999, 1000])
@pytest.mark.parametrize("distinct", [5, 10**6])
def test_top_k_of_many_tokens(k: int, distinct: int) -> None:
    """With whole blocks of logits, with ties (which are kept) and with logits of -inf."""
    logits = np.random.default_rng(k).integers(0, distinct, (3, 1000)).astype(np.float32)
    logits[1, 100:700] = -np.inf
    kth = np.sort(logits, axis=1)[:, -k][:, None]
    expected = np.where(logits < kth, -np.inf, logits)
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("V", [2, 17, 100])
def test_draw_follows_softmax(V: int) -> None:
    """A chi-squared test of 20,000 draws; excluded tokens are never drawn."""
    logits = np.random.default_rng(V).normal(size=V).astype(np.float32)
    logits[3::4] = -np.inf
    keys = jax.random.split(jax.random.key(1), 20_000)
    counts = np.bincount(jax.jit(jax.vmap(draw, in_axes=(0, None)))(keys, jnp.asarray(logits)), minlength=V)
    possible = np.isfinite(logits)
    assert counts[~possible].sum() == 0
    expected = 20_000 * softmax(logits)[possible]
    chi_squared = np.sum((counts[possible] - expected) ** 2 / expected)
    assert jax.scipy.stats.chi2.sf(chi_squared, possible.sum() - 1) > 1e-3


@given(batches, st.floats(0.01, 0.999))
def test_top_p(logits: np.ndarray, p: float) -> None:
    def reference(row: np.ndarray) -> set[int]:
        kept, total = set(), 0.0
        for i in np.argsort(-row):
            if total >= p:
                break
            kept.add(int(i))
            total += softmax(row)[i]
        return kept

    sums = np.cumsum(np.sort(softmax(logits[0]))[::-1])
    if np.min(np.abs(sums - p)) > 1e-5:
        np.testing.assert_array_equal(top_p(jnp.asarray(logits), p), by_row(reference, logits))


def test_sums_that_are_exactly_p_are_enough() -> None:
    """As for transformers: the first tokens that add up to p are kept, and no other."""
    logits = jnp.array([[0.0, -1.0, -2.0, -3.0]])
    probabilities = jax.nn.softmax(logits[0])
    for n in (1, 2, 3):
        p = float((jnp.cumsum(probabilities) - probabilities)[n])  # As float32 adds them up.
        assert np.isfinite(top_p(logits, p)).sum() == n


@given(batches, st.floats(0.01, 1))
def test_min_p(logits: np.ndarray, p: float) -> None:
    def reference(row: np.ndarray) -> set[int]:
        probabilities = softmax(row)
        return set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)))

    ratios = softmax(logits[0]) / softmax(logits[0]).max()
    if np.min(np.abs(ratios - p)) > 1e-5 or p == 1:
        np.testing.assert_array_equal(keep_min_p(jnp.asarray(logits), p), by_row(reference, logits))


def test_a_token_exactly_at_the_threshold_is_kept() -> None:
    logits = jnp.array([[0.0, -1.0, -2.0]])
    np.testing.assert_array_equal(keep_min_p(logits, 1.0), [[0.0, -np.inf, -np.inf]])


@given(
    arrays(np.float32, (2, 9), elements=st.floats(-5, 5, width=32)), arrays(bool, (2, 9)), st.floats(0.5, 2, width=32)
)
def test_repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    expected = logits.copy()
    for b, v in zip(*np.nonzero(seen), strict=True):
        expected[b, v] = logits[b, v] / penalty if logits[b, v] > 0 else logits[b, v] * penalty
    ours = penalise_repetition(jnp.asarray(logits), jnp.asarray(seen), penalty)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)


@settings(max_examples=25)
@given(batches, st.floats(0.1, 2), st.integers(0, 20), st.floats(0.05, 1), st.floats(0, 1))
def test_together_they_leave_the_most_probable_token(
    logits: np.ndarray, temperature: float, k: int, p: float, min_p: float
) -> None:
    filtered = np.asarray(apply(Filters(temperature, k, p, min_p), jnp.asarray(logits), None))
    np.testing.assert_array_equal(np.argmax(filtered, -1), np.argmax(logits, -1))
    kept = np.isfinite(filtered)
    np.testing.assert_allclose(filtered[kept], (logits / np.float32(temperature))[kept], rtol=1e-5, atol=1e-6)
    assert kept.sum(-1).max() <= (k or 17)


def test_draws_follow_the_filtered_distribution() -> None:
    """A chi-squared test of 20,000 draws with temperature and top-k."""
    logits = jnp.array([[0.0, 1.0, 2.0, 3.0, -1.0]])
    filtered = apply(Filters(temperature=1.5, top_k=3), logits, None)
    draws = jax.random.categorical(jax.random.key(0), filtered[0], shape=(20_000,))
    counts = np.bincount(draws, minlength=5)
    expected = 20_000 * softmax(np.array([1.0, 2.0, 3.0]) / 1.5)
    assert counts[[0, 4]].sum() == 0
    assert np.sum((counts[1:4] - expected) ** 2 / expected) < 13.8  # 2 degrees of freedom: once in a thousand.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 is not possible: it must be 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Filters(**arguments)  # type: ignore[arg-type]
