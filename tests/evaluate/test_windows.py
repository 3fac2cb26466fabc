"""Windows score every token exactly once, whatever the pieces they come in, and batches lose none of them."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.evaluate.windows import Window, batches, windows


def cut(text: np.ndarray, places: list[int]) -> list[np.ndarray]:
    return np.split(text, sorted(place % (len(text) + 1) for place in places))


@given(st.integers(0, 70), st.integers(1, 20), st.data(), st.lists(st.integers(0, 1000), max_size=5))
def test_every_token_but_the_first_is_scored_once(n: int, T: int, data: st.DataObject, places: list[int]) -> None:
    stride = data.draw(st.integers(1, T))
    text = np.arange(n, dtype=np.int32)  # Each token says where it stands.
    found = list(windows(cut(text, places), T, stride))
    scored = [target for window in found for target in window.tokens[1 + window.seen :]]
    np.testing.assert_array_equal(scored, text[1:])
    for i, window in enumerate(found):
        start = i * stride
        np.testing.assert_array_equal(window.tokens, text[start : start + T + 1])  # In order, without a gap.
        assert window.n_scored == len(window.tokens) - 1 - window.seen > 0
        assert window.seen == (0 if i == 0 else T - stride)


def test_a_long_text_is_not_held() -> None:
    """Pieces are read as windows are asked for."""
    n_read = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal n_read
        for _ in range(1000):
            n_read += 1
            yield np.zeros(100, np.int32)

    found = windows(pieces(), 64, 32)
    for _ in range(10):
        next(found)
    assert n_read < 8


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_window_in_few_shapes(batch_size: int, rng: np.random.Generator) -> None:
    lengths = rng.integers(1, 101, 60)
    given = [Window(rng.integers(1, 9, n + 1).astype(np.int32), int(rng.integers(0, n))) for n in lengths]
    shapes, found = set(), {}
    for numbers, batch in batches(given, batch_size, 100, least=16):
        assert batch.tokens.shape == (batch_size, batch.mask.shape[1] + 1)
        shapes.add(batch.mask.shape)
        assert not batch.mask[len(numbers) :].any()
        for row, number in enumerate(numbers):
            found[number] = batch.tokens[row], batch.mask[row]
    assert shapes <= {(batch_size, T) for T in (16, 32, 64, 100)}
    assert sorted(found) == list(range(60))
    for number, (tokens, mask_T) in found.items():
        window = given[number]
        n = len(window.tokens) - 1
        assert len(mask_T) == next(T for T in (16, 32, 64, 100) if n <= T)
        np.testing.assert_array_equal(tokens[: n + 1], window.tokens)
        np.testing.assert_array_equal(mask_T, (np.arange(len(mask_T)) >= window.seen) & (np.arange(len(mask_T)) < n))
