"""Each filter against a reference in NumPy, on generated logits."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpt_jax.cli.parse import parse
from gpt_jax.cli.sample import SampleArgs
from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT
from gpt_jax.sample.filters import (
    RowFilters,
    add_bias,
    adjust,
    apply,
    draw,
    keep_allowed,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    largest,
    least_by_bits,
    penalise_presence,
    penalise_repetition,
    row_filters,
)
from gpt_jax.sample.generate import Result
from gpt_jax.sample.settings import Filters, Settings, changed
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.train.tasks import texts
from tests import tiny

# Distinct by a good margin: with ties, or sums at the edge of p, float32 and float64 may rightly disagree.
batches = st.integers(1, 4).flatmap(
    lambda b: st.lists(
        st.permutations(range(17)).map(lambda order: np.array(order, np.float32) * 0.37 - 2.9), min_size=b, max_size=b
    ).map(np.stack)
)


def with_all(keep: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Any, float], jax.Array]:
    """A filter that gives all rows the same limit."""
    compiled = jax.jit(keep)
    dtype = np.int32 if keep is keep_top_k else np.float32
    return lambda logits, limit: compiled(jnp.asarray(logits), np.full(len(logits), limit, dtype))


top_k, top_p, min_p = map(with_all, (keep_top_k, keep_top_p, keep_min_p))


def rows_of(*filters: Filters) -> RowFilters:
    """A row for each of the filters."""
    return jax.tree.map(lambda *xs: np.stack(xs), *map(row_filters, filters))


@settings(max_examples=50, deadline=None)
@given(
    logits=arrays(np.float32, (3, 11), elements=st.floats(width=32, allow_nan=False)),
    k=arrays(np.int32, 3, elements=st.integers(1, 12)),
)
def test_the_threshold_is_the_kth_largest_logit_however_many_bits_are_found_at_a_time(
    logits: np.ndarray, k: np.ndarray
) -> None:
    """Of any float32, infinities and both zeros among them; one bit at a time is how CPUs find it, four are for
    accelerators. With fewer than k logits, it is -inf."""
    expected = [np.sort(row)[::-1][n - 1] if n <= len(row) else -np.inf for row, n in zip(logits, k, strict=True)]
    few = lambda is_above: jnp.sum(is_above, axis=-1) < k[:, None]  # noqa: E731
    for bits in (1, 4):
        np.testing.assert_array_equal(least_by_bits(jnp.asarray(logits), few, bits), expected)


@jax.jit
def filtered(rows: RowFilters, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """The logits that are drawn from, after the repetition penalty, too; greedy rows are as at a temperature of 1."""
    nothing = jnp.zeros(logits.shape, jnp.int32)
    return apply(rows, adjust(rows, logits, seen, nothing, jnp.ones(len(logits), bool)))


def applied(filters: Filters, logits: Any, seen: Any = None) -> np.ndarray:
    """All rows filtered alike."""
    seen = np.zeros(np.shape(logits), bool) if seen is None else seen
    return np.asarray(filtered(rows_of(*[filters] * len(logits)), jnp.asarray(logits), jnp.asarray(seen)))


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
    np.testing.assert_array_equal(top_k(logits, k), expected)


@pytest.mark.parametrize("k", [1, 7, 50, 999, 1000])
@pytest.mark.parametrize("distinct", [5, 10**6])
def test_top_k_of_many_tokens(k: int, distinct: int) -> None:
    """With whole blocks of logits, with ties (which are kept) and with logits of -inf."""
    logits = np.random.default_rng(k).integers(0, distinct, (3, 1000)).astype(np.float32)
    logits[1, 100:700] = -np.inf
    kth = np.sort(logits, axis=1)[:, -k][:, None]
    expected = np.where(logits < kth, -np.inf, logits)
    np.testing.assert_array_equal(top_k(logits, k), expected)


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
        np.testing.assert_array_equal(top_p(logits, p), by_row(reference, logits))


def test_sums_that_are_exactly_p_are_enough() -> None:
    """As for transformers: the first tokens that add up to p are kept, and no other."""
    logits = jnp.array([[0.0, -1.0, -2.0, -3.0]])
    probabilities = jax.nn.softmax(logits[0])
    for n in (1, 2, 3):
        p = float(jnp.sum(probabilities[:n]))  # As float32 adds them up.
        assert np.isfinite(top_p(logits, p)).sum() == n


@given(batches, st.floats(0.01, 1))
def test_min_p(logits: np.ndarray, p: float) -> None:
    def reference(row: np.ndarray) -> set[int]:
        probabilities = softmax(row)
        return set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)))

    ratios = softmax(logits[0]) / softmax(logits[0]).max()
    if np.min(np.abs(ratios - p)) > 1e-5 or p == 1:
        np.testing.assert_array_equal(min_p(logits, p), by_row(reference, logits))


def test_a_token_exactly_at_the_threshold_is_kept() -> None:
    logits = jnp.array([[0.0, -1.0, -2.0]])
    np.testing.assert_array_equal(min_p(logits, 1.0), [[0.0, -np.inf, -np.inf]])


@given(
    arrays(np.float32, (2, 9), elements=st.floats(-5, 5, width=32)), arrays(bool, (2, 9)), st.floats(0.5, 2, width=32)
)
def test_repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    expected = logits.copy()
    for b, v in zip(*np.nonzero(seen), strict=True):
        expected[b, v] = logits[b, v] / penalty if logits[b, v] > 0 else logits[b, v] * penalty
    ours = penalise_repetition(jnp.asarray(logits), jnp.asarray(seen), penalty)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)


@given(
    arrays(np.float32, (2, 9), elements=st.floats(-5, 5, width=32)),
    arrays(np.int32, (2, 9), elements=st.integers(0, 5)),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
)
def test_presence_and_frequency_penalties(
    logits: np.ndarray, counts: np.ndarray, presence: float, frequency: float
) -> None:
    expected = logits.astype(np.float64) - np.where(counts > 0, presence, 0) - frequency * counts
    ours = penalise_presence(jnp.asarray(logits), jnp.asarray(counts), presence, frequency)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("V", [5, 32, 70])
def test_what_is_not_allowed_is_left_out_of_masked_rows(V: int, rng: np.random.Generator) -> None:
    """There may be bits beyond the logits, as where a mesh pads the vocabulary."""
    logits, allowed = rng.normal(size=(3, V)).astype(np.float32), rng.random((3, 96)) < 0.5
    bits = np.packbits(allowed, axis=1, bitorder="little").view("<u4")
    kept = keep_allowed(jnp.asarray(logits), jnp.asarray(bits), jnp.array([True, False, True]))
    expected = np.where(allowed[:, :V], logits, -np.inf)
    expected[1] = logits[1]
    np.testing.assert_array_equal(kept, expected)


def test_biases_are_added_to_their_tokens() -> None:
    logits = np.zeros((2, 5), np.float32)
    tokens, bias = np.array([[0, 4, -1], [-1, -1, 2]], np.int32), np.array([[1, -100, 7], [7, 7, 3]], np.float32)
    expected = [[1, 0, 0, 0, -100], [0, 0, 3, 0, 0]]
    np.testing.assert_array_equal(add_bias(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(bias)), expected)


@given(batches, st.integers(1, 17))
def test_the_largest_logits_and_their_tokens(logits: np.ndarray, k: int) -> None:
    values, tokens = jax.jit(largest, static_argnames="k")(logits, k=k)
    expected = np.argsort(-logits, axis=1)[:, :k]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            Filters,
            st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            st.sampled_from([0, 1, 3, 20]),
            st.sampled_from([0.3, 0.9, 1.0]),
            st.sampled_from([0.0, 0.2]),
            st.sampled_from([1.0, 1.5]),
            st.sampled_from([0.0, 1.0]),
            st.sampled_from([0.0, -0.5]),
            st.sampled_from([(), ((3, 5.0),), ((0, -100.0), (16, 2.0))]),
        ),
        min_size=3,
        max_size=3,
    )
)
def test_a_row_is_filtered_by_its_own_settings(filters: list[Filters]) -> None:
    """Whatever its neighbours ask for: to the last bit as in the company of its like. Greedy rows are not drawn."""
    logits = np.random.default_rng(0).normal(size=(3, 17)).astype(np.float32) * 2
    seen = logits > 1
    together = np.asarray(filtered(rows_of(*filters), jnp.asarray(logits), jnp.asarray(seen)))
    for i in (i for i in range(3) if filters[i].temperature):
        alike = applied(filters[i], np.stack([logits[i]] * 3), np.stack([seen[i]] * 3))
        np.testing.assert_array_equal(together[i], alike[1])


@settings(max_examples=25)
@given(batches, st.floats(0.1, 2), st.integers(0, 20), st.floats(0.05, 1), st.floats(0, 1))
def test_together_they_leave_the_most_probable_token(
    logits: np.ndarray, temperature: float, k: int, p: float, least: float
) -> None:
    left = applied(Filters(temperature, k, p, least), logits)
    np.testing.assert_array_equal(np.argmax(left, -1), np.argmax(logits, -1))
    kept = np.isfinite(left)
    expected = (logits - logits.max(-1, keepdims=True)) / np.float32(temperature)  # The same after softmax.
    np.testing.assert_allclose(left[kept], expected[kept], rtol=1e-5, atol=1e-6)
    assert kept.sum(-1).max() <= (k or 17)


def test_draws_follow_the_filtered_distribution() -> None:
    """A chi-squared test of 20,000 draws with temperature and top-k."""
    logits = jnp.array([[0.0, 1.0, 2.0, 3.0, -1.0]])
    left = applied(Filters(temperature=1.5, top_k=3), logits)
    draws = jax.random.categorical(jax.random.key(0), left[0], shape=(20_000,))
    counts = np.bincount(draws, minlength=5)
    expected = 20_000 * softmax(np.array([1.0, 2.0, 3.0]) / 1.5)
    assert counts[[0, 4]].sum() == 0
    assert np.sum((counts[1:4] - expected) ** 2 / expected) < 13.8  # 2 degrees of freedom: once in a thousand.


# Logits of two rows, with masked tokens (as padding of a vocabulary is), ties, and magnitudes of any float32.
EDGES = np.array([[-np.inf, 2, 3, -1, 3.0001, -np.inf], [1e30, -1e30, 1e-30, 0, 1e30, -np.inf]], np.float32)
TOP = [{4}, {0, 4}]


def chances(filters: Filters) -> np.ndarray:
    """The probability of each token, by a compiled program, as in decoding."""
    probabilities = np.asarray(jax.nn.softmax(applied(filters, EDGES)))
    assert np.all(probabilities[np.isneginf(EDGES)] == 0)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
    return probabilities


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-45, 1e-40, 1e-38, 2.0**-126, 1e-30])
def test_a_temperature_that_goes_to_zero_is_greedy(temperature: float) -> None:
    """Also where float32 rounds it to 0, and where logits divided by it overflow."""
    assert [set(np.flatnonzero(row)) for row in chances(Filters(temperature, top_p=1))] == TOP


@pytest.mark.parametrize("temperature", [1e36, 3e38, 1e39, 1e300, 10**400, math.inf])
def test_a_temperature_that_goes_to_infinity_is_uniform(temperature: float) -> None:
    probabilities = chances(Filters(temperature, top_p=1))
    np.testing.assert_allclose(probabilities[0], [0, 0.25, 0.25, 0.25, 0.25, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities[1], [0.2, 0.2, 0.2, 0.2, 0.2, 0], rtol=1e-5)


@pytest.mark.parametrize("p", [5e-324, 1e-46, 1e-40, 1e-38, 1e-7])
def test_a_top_p_that_goes_to_zero_leaves_the_most_probable_token(p: float) -> None:
    assert [set(np.flatnonzero(row)) for row in chances(Filters(1.0, top_p=p))] == TOP


@pytest.mark.parametrize(
    "arguments", [{"min_p": 5e-324}, {"min_p": 1e-46}, {"min_p": -0.0}, {"top_p": 1 - 1e-16}, {"top_k": 10**400}]
)
def test_filters_that_go_to_their_other_end_change_nothing(arguments: dict[str, float]) -> None:
    filters = Filters(1.0, **{"top_p": 1, **arguments})  # type: ignore[arg-type]
    kept_BV = np.isfinite(applied(filters, EDGES[:1]))
    np.testing.assert_array_equal(kept_BV, np.isfinite(EDGES[:1]))


@pytest.mark.parametrize("temperature", [0.0, -0.0, 1e-46, 1e-38, 0.8, 1e38, math.inf])
@pytest.mark.parametrize("others", [{}, {"top_k": 2, "top_p": 1e-46, "min_p": 5e-324, "repetition_penalty": 1e6}])
def test_no_filter_leads_out_of_the_vocabulary(temperature: float, others: dict[str, float]) -> None:
    seen = jnp.array([[False, True, True, True, True, True]] * 2)
    left = applied(Filters(temperature, **others), EDGES, seen)  # type: ignore[arg-type]
    keys = jax.random.split(jax.random.key(0), 20)
    for row in (0, 1):
        ids = np.asarray(jax.vmap(draw, in_axes=(0, None))(keys, left[row]))
        assert np.all(np.isfinite(EDGES[row][ids]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 is not possible: it must be 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty = 1e-38 is not possible: it must be between 1e-06 and 1e"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"top_p": -0.0}, "top_p = -0.0"),
        ({"presence_penalty": 101}, "presence_penalty = 101 is not possible: it must be between -100 and 100"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty = -inf"),
        ({"logit_bias": {3: 1.0}}, "logit_bias = .* is not possible: it must be at most 300 pairs of a token's id and"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias = "),
        ({"logit_bias": ((3, math.nan),)}, "logit_bias = "),
        ({"logit_bias": ((3, 101),)}, "logit_bias = "),
        ({"logit_bias": ((3, 1), (3, 2))}, "logit_bias = "),
        ({"logit_bias": tuple((i, 1) for i in range(301))}, "logit_bias = "),
        ({"top_p": 10**400}, "top_p = 1000"),
        ({"temperature": "0.5"}, "temperature = '0.5' is not possible: it must be a number"),
        ({"top_k": 2.0}, "top_k = 2.0 is not possible: it must be a whole number"),
        *[({name: math.nan}, f"{name} = nan is not possible") for name in vars(Filters())],
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Filters(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["END", ("",), (b"END",), (3,), None])
def test_stop_strings_are_a_list_of_strings(stop: Any) -> None:
    """One string would be taken for a list of its characters."""
    with pytest.raises(UserError, match="is not possible: it must be a list of strings, each of one character or more"):
        Settings(stop=stop)


def test_there_is_one_default_of_each_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the command, from Python, and in the samples of a training. Only lm_eval has its own, of transformers."""
    used: list[Settings] = []

    def generate(*args: Any) -> list[Result]:
        used.append(args[-1])
        return [Result([])]

    monkeypatch.setattr(texts, "generate_tokens", generate)
    placement = SimpleNamespace(replicas=lambda params: {0: params})
    data = SimpleNamespace(tokenizer=ByteTokenizer(), by_name={})
    task: Any = SimpleNamespace(placement=placement, config=Config(), data=data, model=GPT(tiny.GPT2))
    texts.TextTask.sample(task, {}, 0)
    command = parse(SampleArgs, [], "sample").settings
    assert used[0].filters == command.filters == changed(Settings(), {}).filters == Filters()
    assert Filters().top_p == 0.95
