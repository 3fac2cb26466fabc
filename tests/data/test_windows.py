"""The windows that are shown are the batch of training, and every token is said to be from where it is."""

import bisect

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.loader import MixedBatches, Source, stack
from gpt_jax.data.mixture import Stage
from gpt_jax.data.packing import PackedRows, pack
from gpt_jax.data.rows import Rows, Stream
from gpt_jax.data.windows import windows
from tests.data.splits import Split, splits


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[MixedBatches, list[Split]]:
    """Batches of one to three splits, as streams and packed, and those of the splits that have a window."""
    T, kept, sources = draw(st.integers(1, 12)), [], []
    for i in range(draw(st.integers(1, 3))):
        split = draw(splits)
        rows: Rows = PackedRows(split, pack(split, T)) if draw(st.booleans()) else Stream(split, T)
        if rows.mean_targets:
            kept.append(split)
            sources.append(Source(f"s{i}", rows))
    if not sources:
        kept, sources = [Split([T + 1])], [Source("s", Stream(Split([T + 1]), T))]
    stages = [Stage(0, (1.0,) * len(sources)), Stage(2, tuple(float(i + 1) for i in range(len(sources))))]
    return MixedBatches(sources, stages, draw(st.integers(1, 6)), draw(st.integers(0, 99))), kept


@given(mixtures(), st.integers(1, 40))
def test_the_windows_are_the_batch_of_training(mixture: tuple[MixedBatches, list[Split]], step: int) -> None:
    """Of the step that metrics.jsonl counts from 1, and the batches from 0."""
    batches, _ = mixture
    batch, found = batches(step - 1), windows(batches, step)
    shown = stack([window.row for window in found], batch.mask is not None, batch.segments is not None)
    for ours, expected in zip(shown, batch, strict=True):
        assert ours is expected is None or (ours.dtype == expected.dtype and np.array_equal(ours, expected))
    mask = np.ones_like(batch.tokens[:, 1:], bool) if batch.mask is None else batch.mask
    assert np.array_equal([window.learnt[1:] for window in found], mask)
    assert not any(window.learnt[0] for window in found)


@given(mixtures(), st.integers(1, 40))
def test_every_token_is_where_the_pieces_say(mixture: tuple[MixedBatches, list[Split]], step: int) -> None:
    """Token by token, by the ids, which tell places."""
    batches, kept = mixture
    names = [source.name for source in batches.sources]
    for window in windows(batches, step):
        split = kept[names.index(window.folder)]
        starts = split.document_starts.tolist()
        ends = [*starts[1:], len(split)]
        said = [(piece.document, piece.first + i, piece.whole) for piece in window.pieces for i in range(piece.length)]
        places = [token - 1 for token in window.row.tokens[: len(said)].tolist()]
        documents = [bisect.bisect_right(starts, place) for place in places]
        assert said == [
            (d, place - starts[d - 1] + 1, ends[d - 1] - starts[d - 1])
            for d, place in zip(documents, places, strict=True)
        ]
        assert not window.row.tokens[len(said) :].any()  # Padding.
        assert all(piece.length > 0 for piece in window.pieces)
        assert window.masked == split.masked
