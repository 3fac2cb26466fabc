"""The data order is a pure function of (seed, step): what that promises, for generated sizes."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.loader import MixedBatches, Prefetch, eval_batches, permute
from gpt_jax.data.rows import Stream
from gpt_jax.errors import UserError
from tests.data.splits import Split, stream_batches

seeds = st.integers(0, 2**31 - 1)


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(2**40, 2**62), index=st.integers(0, 2**40 - 1), seed=seeds)
def test_permute_of_a_huge_range_needs_no_memory(n: int, index: int, seed: int) -> None:
    assert 0 <= permute(np.array([index]), n, seed)[0] < n


def test_permute_is_random_enough() -> None:
    """Neighbours do not stay neighbours, and every place is reached from everywhere: a chi-squared test."""
    n, trials = 10, 5000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    chi_squared = np.sum((counts - trials / n) ** 2 / (trials / n))
    assert chi_squared < 140  # 81 degrees of freedom: mean 81, deviation 12.7.
    large = permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(large)) == 1) < 1e-3


@st.composite
def loaders(draw: st.DrawFn) -> tuple[MixedBatches, Stream]:
    context_length = draw(st.integers(1, 20))
    n_tokens = draw(st.integers(context_length + 1, 400))
    batches = stream_batches(Split([n_tokens]), context_length, draw(st.integers(1, 12)), draw(seeds))
    return batches, Stream(Split([n_tokens]), context_length)


@given(loaders(), st.integers(0, 2))
def test_an_epoch_visits_every_window_once(loader: tuple[MixedBatches, Stream], epoch: int) -> None:
    """Over one epoch, no token is an input twice, and at most one window's worth of tokens is left out."""
    batches, stream = loader
    n, T, W = len(stream.tokens), stream.context_length, len(stream)
    first, last = epoch * W, (epoch + 1) * W
    steps = range(first // batches.batch_size, -(-last // batches.batch_size))
    rows = np.concatenate([batches(step).tokens for step in steps])
    offset = steps.start * batches.batch_size
    inputs = rows[first - offset : last - offset, :T]
    visits = np.bincount(inputs.reshape(-1) - 1, minlength=n)
    assert visits.max() == 1
    assert visits.sum() == W * T > n - T


@given(loaders(), st.integers(0, 1000))
def test_a_window_is_consecutive_tokens_of_the_ring(loader: tuple[MixedBatches, Stream], step: int) -> None:
    batches, stream = loader
    rows, *rest = batches(step)
    assert rest == [None] * 4  # Every token is a target, and a row is one document.
    assert rows.dtype == np.int32
    assert rows.shape == (batches.batch_size, stream.context_length + 1)
    assert np.array_equal(rows[:, 1:], rows[:, :-1] % len(stream.tokens) + 1)


@given(loaders(), st.integers(0, 10**9))
def test_any_step_is_reached_at_once_and_always_the_same(loader: tuple[MixedBatches, Stream], step: int) -> None:
    batches, _ = loader
    assert np.array_equal(batches(step).tokens, batches(step).tokens)


@given(loaders(), st.integers(0, 50), st.integers(1, 4))
def test_hosts_share_out_the_global_batch(loader: tuple[MixedBatches, Stream], step: int, n_hosts: int) -> None:
    """The rows that each asks for are those of the batch of a single host."""
    batches, _ = loader
    rows = np.random.default_rng(0).permutation(batches.batch_size)
    shares = [batches(step, share).tokens for share in np.array_split(rows, n_hosts) if len(share)]
    assert np.array_equal(np.concatenate(shares), batches(step).tokens[rows])


def test_rows_that_are_remote_are_read_together() -> None:
    """And come in their order."""
    meeting = threading.Barrier(8)

    class Remote(Split):
        is_remote = True

        def read(self, start: int, count: int) -> np.ndarray:
            meeting.wait(10)
            return super().read(start, count)

    here, there = (stream_batches(kind([800]), 16, 8, seed=1) for kind in (Split, Remote))
    for step in range(3):
        np.testing.assert_array_equal(here(step).tokens, there(step).tokens)


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, n: int) -> list[int]:
        batches = stream_batches(Split([1000]), 10, 100, seed)
        return batches(n).tokens[:, 0].tolist()

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert sorted(epoch(0, 0)) != sorted(epoch(0, 1))  # The windows begin elsewhere,
    for other in (epoch(0, 1), epoch(1, 0)):
        assert len(set((np.array(epoch(0, 0)) - other) % 1000)) > 1  # and their order is another as well.


def test_a_split_smaller_than_a_window_is_refused() -> None:
    stream_batches(Split([11]), 10, 4, 0)(0)
    with pytest.raises(UserError, match=r"'text' has the weight 1\.0 from step 0 on, but no row with a target"):
        stream_batches(Split([10]), 10, 4, 0)


@given(n=st.integers(2, 300), T=st.integers(1, 20), B=st.integers(1, 8))
def test_evaluation_asks_for_every_token_but_the_first_once(n: int, T: int, B: int) -> None:
    targets = []
    for tokens, mask, segments, positions, _ in eval_batches(Split([n]), T, B):
        assert segments is positions is None
        assert tokens.shape == (B, T + 1)
        assert np.array_equal(tokens[:, 1:][mask], tokens[:, :-1][mask] + 1)
        targets += tokens[:, 1:][mask].tolist()
    assert targets == list(range(2, n + 1))


def test_prefetch_keeps_the_order_and_works_ahead() -> None:
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step * 10

    with Prefetch(make, range(3, 100)) as results:
        iterator: Iterator[int] = iter(results)
        assert [next(iterator), next(iterator)] == [30, 40]
        for _ in range(100):
            if len(made) >= 4:
                break
            time.sleep(0.01)
        assert made[:4] == [3, 4, 5, 6]
        assert len(made) <= 2 + 2 + 1  # Taken, waiting in the queue, in the thread's hands.
    assert not results.thread.is_alive()


def test_prefetch_passes_on_what_goes_wrong() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise UserError("the disk went away")
        return step

    taken: list[int] = []
    with pytest.raises(UserError, match="the disk went away"), Prefetch(make, range(5)) as results:
        taken.extend(iter(results))
    assert taken in ([], [0, 1])
