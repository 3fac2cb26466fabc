"""Batches of one or several sources: what they hold, in which order, and what is shared out among hosts."""

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import MixedBatches, Source, eval_batches, packed_eval_batches
from gpt_jax.data.mixture import Stage
from gpt_jax.data.packing import PackedRows, pack
from gpt_jax.data.rows import Stream
from gpt_jax.errors import UserError
from tests.data.splits import Split, conversations, splits, stream_batches

seeds = st.integers(0, 2**31 - 1)
T = 7


def sources(*kinds: str) -> list[Source]:
    """Sources of 40 tokens or so: texts as a stream, or conversations as a stream or packed."""
    split = {"text": Split([16, 9, 15]), "chat": Split([[False, True, True, False, True]] * 9)}
    split["packed"] = split["chat"]
    rows = [
        PackedRows(split[kind], pack(split[kind], T)) if kind == "packed" else Stream(split[kind], T) for kind in kinds
    ]
    return [Source(f"{kind}-{i}", row) for i, (kind, row) in enumerate(zip(kinds, rows, strict=True))]


def test_the_order_of_a_stream_is_that_of_earlier_versions() -> None:
    """Runs that go on must see what they would have seen."""
    batches = stream_batches(Split([1000]), 10, 4, 7)
    starts = [(batches(step).tokens[:, 0] - 1).tolist() for step in (0, 24, 25, 1000)]
    assert starts == [[980, 230, 550, 400], [760, 700, 220, 480], [56, 716, 36, 646], [530, 90, 450, 120]]


@given(st.integers(0, 3000), st.sampled_from([1, 2, 4]), seeds)
def test_hosts_share_out_the_global_batch(step: int, n_hosts: int, seed: int) -> None:
    batches = MixedBatches(sources("text", "packed"), [Stage(0, (1, 2)), Stage(1000, (5, 1))], 8, seed)
    whole = batches(step)
    shares = [batches(step, rows) for rows in np.split(np.arange(8), n_hosts)]
    for expected, *parts in zip(whole[:4], *(share[:4] for share in shares), strict=True):
        assert np.array_equal(np.concatenate(parts), expected)


@functools.cache
def all_rows(kinds: tuple[str, ...]) -> list[list[tuple[int, ...]]]:
    """The tokens of each source's rows, as many as 300 batches have, in the order in which they come."""
    found = sources(*kinds)
    batches = MixedBatches(found, [Stage(0, (1,) * len(kinds)), Stage(90, (1, *[3] * (len(kinds) - 1)))], 8, 5)
    rows: list[list[tuple[int, ...]]] = [[] for _ in kinds]
    for step in range(300):
        source, _ = batches.mixture(step * 8 + np.arange(8))
        for i, row in zip(source.tolist(), batches(step).tokens.tolist(), strict=True):
            rows[i].append(tuple(row))
    for (name, source_rows), drawn in zip(found, rows, strict=True):
        assert batches.epochs(300)[name] == len(drawn) / len(source_rows)
    return rows


def test_each_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    kinds = ("packed", "packed", "text", "text")
    found, orders = sources(*kinds), []
    for (_, rows), drawn in zip(found, all_rows(kinds), strict=True):
        n = len(rows)
        epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
        assert len(epochs) > 10
        for epoch in epochs:
            assert len(set(epoch)) == n
            if rows.packed:
                assert set(epoch) == {tuple(rows.row(i, 0).tokens.tolist()) for i in range(n)}
            else:  # Windows of a ring, from the epoch's offset on.
                assert Counter(token for row in epoch for token in row[:-1]).most_common(1)[0][1] == 1
        orders.append(epochs)
    for epochs in orders:
        assert len({tuple(epoch) for epoch in epochs}) > 0.9 * len(epochs)
    assert orders[0][:5] != orders[1][:5]  # The same rows,
    assert orders[2][:5] != orders[3][:5]  # but each source has its own order.


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        (("text",), {"tokens"}),
        (("text", "chat"), {"tokens", "mask"}),
        (("text", "packed"), {"tokens", "mask", "segments", "positions"}),
    ],
)
def test_a_batch_has_the_fields_that_any_source_needs(kinds: tuple[str, ...], fields: set[str]) -> None:
    """In every batch, also in one of only the other sources, so that one program fits all."""
    weights = (1.0, *[0.5] * (len(kinds) - 1))
    batches = MixedBatches(sources(*kinds), [Stage(0, weights), Stage(2, (1.0, *[0.0] * (len(kinds) - 1)))], 8, 0)
    for step in range(4):
        batch = batches(step)
        assert {name for name, field in zip(Batch._fields, batch, strict=True) if field is not None} == fields
        source, _ = batches.mixture(step * 8 + np.arange(8))
        plain = source == 0
        assert plain.any()
        if "mask" in fields:
            assert batch.mask[plain].all()
            assert plain.all() or not batch.mask[~plain].all()
        if "segments" in fields:
            assert not batch.segments[plain].any()
            assert np.all(batch.positions[plain] == np.arange(T))


def test_weights_count_what_is_learnt() -> None:
    """Of the targets that count, each source has the same share, however many there are in its rows."""
    batches = MixedBatches(sources("text", "chat", "packed"), [Stage(0, (1, 1, 1))], 64, 0)
    targets = np.zeros(3)
    for step in range(100):
        source, _ = batches.mixture(step * 64 + np.arange(64))
        np.add.at(targets, source, batches(step).mask.sum(axis=1))
    np.testing.assert_allclose(targets / targets.sum(), 1 / 3, rtol=0.02)


def test_a_stream_reads_the_mask_of_its_targets() -> None:
    split = Split([[False, True, True, False, True]] * 9)
    batches = stream_batches(split, T, 6, 0)
    for step in range(9):
        batch = batches(step)
        assert np.array_equal(batch.mask, split.mask[batch.tokens[:, 1:] - 1])
        assert batch.segments is batch.positions is None


def test_an_empty_source_is_refused() -> None:
    nothing = Source("nothing", Stream(Split([T]), T))
    text = sources("text")
    with pytest.raises(UserError, match="'nothing' has the weight 1 from step 0 on, but no row with a target"):
        MixedBatches([*text, nothing], [Stage(0, (1, 1))], 8, 0)
    batches = MixedBatches([*text, nothing], [Stage(0, (1, 0))], 8, 0)
    assert batches(3).tokens.shape == (8, T + 1)
    assert batches.epochs(5) == {"text-0": 8.0, "nothing": 0.0}


@given(st.builds(Split, conversations()), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_of_a_stream_leaves_out_what_is_not_learnt(split: Split, T: int, B: int) -> None:
    found = [batch.tokens[:, 1:][batch.mask] for batch in eval_batches(split, T, B)]
    assert np.concatenate([[], *found]).tolist() == split.ids[1:][split.mask[1:]].tolist()


@given(splits, st.integers(1, 20), st.integers(1, 5))
def test_evaluation_has_every_row_once(split: Split, T: int, B: int) -> None:
    rows = PackedRows(split, pack(split, T))
    batches = list(packed_eval_batches(rows, B))
    assert len(batches) == -(-len(rows) // B)
    found = [Batch(*(x[b] for x in batch[:4])) for batch in batches for b in range(B)]
    for index, row in enumerate(found):
        if index < len(rows):
            assert all(np.array_equal(a, b) for a, b in zip(row, rows.row(index, 0), strict=True))
        else:
            assert not row.mask.any()
            assert not row.segments.any()
            assert row.positions.tolist() == list(range(T))
