"""The mixture is a pure function of (settings, seed, step), near its weights everywhere, and leaves out no row."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.mixture import BLOCK, Mixture, Stage, counts_at
from gpt_jax.errors import UserError

seeds = st.integers(0, 2**31 - 1)


def shares_of(weights: Sequence[float], mean_targets: Sequence[float]) -> np.ndarray:
    """The share of samples of each source."""
    rates = np.array(weights) / mean_targets
    return rates / rates.sum()


@st.composite
def mixtures(draw: st.DrawFn, n_stages: int = 3) -> tuple[Mixture, list[Stage], list[float], int]:
    """A mixture of one to five sources, its stages, the targets in a row of each source, and the batch size."""
    n = draw(st.integers(1, 5))
    weights = st.lists(st.sampled_from([0, 1e-5, 0.02, 0.3, 1, 7]), min_size=n, max_size=n).filter(any).map(tuple)
    starts = draw(st.lists(st.integers(1, 900), max_size=n_stages - 1, unique=True).map(sorted))
    stages = [Stage(start, draw(weights)) for start in (0, *starts)]
    mean_targets = draw(st.lists(st.sampled_from([0.5, 64, 1024]), min_size=n, max_size=n))
    batch_size = draw(st.integers(1, 48))
    mixture = Mixture([f"s{i}" for i in range(n)], mean_targets, stages, batch_size, draw(seeds))
    return mixture, stages, mean_targets, batch_size


@given(mixtures())
def test_each_source_is_counted_without_a_gap(example: tuple[Mixture, list[Stage], list[float], int]) -> None:
    """Over blocks and stages; and any sample, reached at once and in any order, is that of the whole sequence."""
    mixture, stages, _, batch_size = example
    samples = np.arange(1000 * batch_size)
    sources, numbers = mixture(samples)
    for source in range(len(stages[0].weights)):
        assert np.array_equal(numbers[sources == source], np.arange(np.sum(sources == source)))
    shuffled = np.random.default_rng(0).permutation(samples)[:100]
    assert np.array_equal(mixture(shuffled), (sources[shuffled], numbers[shuffled]))
    for n in (0, 1, len(samples) // 3, len(samples)):
        assert np.array_equal(mixture.counts(n), np.bincount(sources[:n], minlength=len(stages[0].weights)))


@given(mixtures())
def test_a_source_without_weight_is_not_drawn(example: tuple[Mixture, list[Stage], list[float], int]) -> None:
    mixture, stages, _, batch_size = example
    for stage, following in zip(stages, [*(stage.start for stage in stages[1:]), 1000], strict=True):
        if stage.start < following:
            sources, _ = mixture(np.arange(stage.start * batch_size, following * batch_size))
            assert all(stage.weights[source] for source in np.unique(sources))


@given(mixtures(n_stages=1), st.integers(0, 10**7))
def test_all_parts_of_a_run_are_near_the_weights(
    example: tuple[Mixture, list[Stage], list[float], int], first: int
) -> None:
    """Of any length, and from any sample on: a few samples off at most."""
    mixture, [(_, weights)], mean_targets, _ = example
    shares = shares_of(weights, mean_targets)
    sources, _ = mixture(np.arange(first, first + 3000))
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(counts - shares * np.arange(1, 3001)[:, None]).max() < 16
    assert np.abs(mixture.counts(first) - shares * first).max() < 10


@given(st.lists(st.floats(0.02, 1), min_size=2, max_size=8), seeds)
def test_weights_are_kept_within_one_percent(weights: list[float], seed: int) -> None:
    """In 1,000 steps of 32 rows; in the long run, exactly."""
    weights = [max(w / sum(weights), 0.02) for w in weights]
    mixture = Mixture([str(i) for i in range(len(weights))], [8.0] * len(weights), [Stage(0, tuple(weights))], 32, seed)
    shares = shares_of(weights, [8] * len(weights))
    np.testing.assert_allclose(mixture.counts(32_000) / 32_000, shares, rtol=0.01)
    np.testing.assert_allclose(mixture.counts(10**12) / 10**12, shares, rtol=1e-9)


@given(st.lists(st.fractions(0, 1, max_denominator=1000), min_size=1, max_size=6).filter(any), st.integers(0, 10**15))
def test_parts_sum_up_and_never_fall(rates: list[Fraction], n: int) -> None:
    before, after = counts_at(rates, n), counts_at(rates, n + 1)
    assert sum(before) == n
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(rates) - 1) + [1]
    assert all(abs(count - n * rate / sum(rates)) < len(rates) for count, rate in zip(before, rates, strict=True))


def test_weights_are_shares_of_targets() -> None:
    """Rows of the first source have a tenth of the targets, so it has ten times as many rows."""
    mixture = Mixture(["a", "b"], [10, 100], [Stage(0, (1, 1))], 1, 0)
    assert mixture.counts(11 * BLOCK).tolist() == [10 * BLOCK, BLOCK]


def test_seeds_and_blocks_have_orders_of_their_own() -> None:
    def block(seed: int, i: int) -> list[int]:
        mixture = Mixture(["a", "b"], [1, 1], [Stage(0, (3, 5)), Stage(BLOCK * 2, (3, 5))], 1, seed)
        return mixture(np.arange(i * BLOCK, (i + 1) * BLOCK))[0].tolist()

    orders = [block(0, 0), block(0, 1), block(0, 2), block(1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("names", "stages", "message"),
    [
        ("ab", [(0, (1, -1))], "the weight of 'b' from step 0 on is -1; it must be finite, 0 or more"),
        ("ab", [(0, (1, 1)), (7, (NAN, 1))], "the weight of 'a' from step 7 on is nan;"),
        ("ab", [(0, (1, INF))], "the weight of 'b' from step 0 on is inf;"),
        ("ab", [(0, (1, 1)), (7, (0, 0))], "all weights of the mixture are 0 from step 7 on"),
        ("ab", [(0, (1,))], "1 weights from step 0 on for 2 sources"),
        ("ab", [(5, (1, 1))], "start at the steps [5]; they must ascend, and the first be 0"),
        ("ab", [], "start at the steps []; they must"),
        ("ab", [(0, (1, 1)), (9, (1, 1)), (7, (1, 1))], "start at the steps [0, 9, 7]; they must"),
        ("ab", [(0, (1, 1)), (0, (1, 1))], "start at the steps [0, 0]; they must"),
        ("aba", [(0, (1, 1, 1))], "two sources 'a'; give each a name of its own"),
        ("a-", [(0, (1, 0)), (3, (1, 2))], "the source '-' has the weight 2 from step 3 on, but no row with a target;"),
    ],
)
def test_impossible_mixtures_are_refused(names: str, stages: list[tuple[int, tuple[float, ...]]], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        Mixture([*names], [0 if name == "-" else 9 for name in names], [Stage(*stage) for stage in stages], 1, 0)
    assert message in str(refusal.value)
