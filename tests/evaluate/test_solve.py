"""The estimates of how much is solved: against counting all cases, and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.evaluate.solve import interval, pass_at_k


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, data: st.DataObject) -> None:
    n_right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([1] * n_right + [0] * (n - n_right), k))
    assert pass_at_k(n, n_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("p", "n"), [(0.05, 200), (0.5, 50), (0.93, 100)])
def test_intervals_hold_the_truth_as_often_as_they_say(p: float, n: int) -> None:
    rng = np.random.default_rng(0)
    for k in (1, 4):
        found = [interval((rng.binomial(k, p, n) / k).tolist()) for _ in range(2000)]
        assert 0.92 <= np.mean([low <= p <= high for low, high in found]) <= 0.98


def test_intervals_at_the_ends() -> None:
    assert interval([0.0] * 10)[0] == 0
    assert 0.2 < interval([0.0] * 10)[1] < 0.3
    assert interval([1.0] * 10)[1] == pytest.approx(1)
    assert interval([1.0])[0] < 0.3
    assert interval([0.5])[0] < 0.2  # One problem, or equal rates, tell as little.
