"""Packing loses nothing that it does not count, and a packed row says what belongs together."""

import dataclasses
import errno
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import packing
from gpt_jax.data.packing import PackedRows, Packing, best_fit_decreasing, open_packing, pack
from gpt_jax.storage import arrays
from tests.data.splits import Split, splits, texts

lengths_of = st.integers(1, 20)


def expected_pieces(split: Split, T: int) -> tuple[list[range], int, int]:
    """The tokens of all pieces, document by document; how many documents are cut, and how many are dropped."""
    pieces, n_cut, n_dropped = [], 0, 0
    starts = split.document_starts.astype(int).tolist()
    for start, end in zip(starts, [*starts[1:], len(split)], strict=True):
        stop = end
        if split.masked and end - start > T + 1:
            mask = split.mask
            stop = max((i for i in range(start + 1, start + T + 2) if mask[i - 1] and not mask[i]), default=start)
        found = [range(first, min(first + T + 1, stop)) for first in range(start, stop - 1, T)]
        found = [piece for piece in found if split.mask[piece[1:]].any()]
        pieces += found
        n_cut += bool(found) and end - start > T + 1
        n_dropped += not found
    return pieces, n_cut, n_dropped


@given(splits, lengths_of)
def test_every_piece_is_in_one_row(split: Split, T: int) -> None:
    packed = pack(split, T)
    expected, n_cut, n_dropped = expected_pieces(split, T)
    ours = [range(start, start + n) for start, n in zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)]
    assert sorted(ours, key=lambda piece: piece.start) == expected
    counts, rows = packed.counts, np.split(packed.lengths, packed.row_starts[1:-1])
    assert all(2 <= row.sum() <= T + 1 for row in rows if expected)
    used = {token for piece in expected for token in piece}
    assert counts == packing.PackingCounts(
        context_length=T,
        documents=len(split.document_starts),
        tokens=len(split),
        cut=n_cut,
        dropped=n_dropped,
        lost=len(split) - len(used),
        pieces=len(expected),
        rows=len(rows) if expected else 0,
        used=sum(map(len, expected)),
        targets=sum(split.mask[piece[1:]].sum() for piece in expected),
    )


@given(splits, lengths_of)
def test_a_row_says_what_belongs_together(split: Split, T: int) -> None:
    """Token by token. Every target that counts is there once: all that are to be learnt, but those that have nothing
    before them, and those that are cut off."""
    packed = pack(split, T)
    rows = PackedRows(split, packed)
    targets: list[int] = []
    for index in range(len(rows)):
        tokens, mask, segments, positions, _ = rows.row(index, 0)
        assert (tokens.dtype, mask.dtype, segments.dtype, positions.dtype) == (np.int32, bool, np.int32, np.int32)
        assert (tokens.shape, mask.shape, segments.shape, positions.shape) == ((T + 1,), (T,), (T,), (T,))
        here = slice(packed.row_starts[index], packed.row_starts[index + 1])
        place = 0
        for segment, (start, n) in enumerate(zip(packed.starts[here], packed.lengths[here], strict=True)):
            assert tokens[place : place + n].tolist() == list(range(start + 1, start + n + 1))
            inputs = slice(place, min(place + n, T))
            assert np.all(segments[inputs] == segment)
            assert positions[inputs].tolist() == list(range(min(n, T - place)))
            assert mask[place : place + n - 1].tolist() == split.mask[start + 1 : start + n].tolist()
            assert not mask[place + n - 1 : place + n].any()
            place += n
        assert not tokens[place:].any()
        assert not mask[max(place - 1, 0) :].any()
        assert np.all(segments[place:] == here.stop - here.start)
        assert positions[place:].tolist() == list(range(T - place))
        targets += tokens[1:][mask].tolist()
    expected = [token + 1 for piece in expected_pieces(split, T)[0] for token in piece[1:] if split.mask[token]]
    assert sorted(targets) == expected
    assert len(targets) == packed.counts.targets == round(rows.mean_targets * len(rows))


@given(texts, lengths_of)
def test_texts_lose_no_target(lengths: list[int], T: int) -> None:
    """Of every document, all tokens but the first are targets once, however long it is."""
    counts = pack(Split(lengths), T).counts
    assert counts.targets == sum(lengths) - len(lengths)
    assert counts.lost == counts.dropped == lengths.count(1)
    assert counts.cut == sum(n > T + 1 for n in lengths)


def by_hand(lengths: list[int], capacity: int) -> list[int]:
    """The space in each row that best-fit decreasing leaves, piece by piece."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append(min(fitting, default=capacity) - length)
    return spaces


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=200))))
def test_longest_first_into_the_fullest_row(example: tuple[int, list[int]]) -> None:
    capacity, lengths = example
    row = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    used = np.bincount(row, lengths)
    assert sorted(capacity - used) == sorted(by_hand(lengths, capacity))
    emptiest_two = np.sort(used)[:2]
    assert len(used) < 2 or emptiest_two.sum() > capacity  # No two rows could be one.


def test_a_million_documents_take_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(int).clip(1)
    split = Split([1])
    split.document_starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
    split.ids = np.broadcast_to(np.int32(1), (lengths.sum(),))  # Takes no memory.
    begun = time.process_time()
    packed = pack(split, 1024)
    assert time.process_time() - begun < 3  # 0.7 seconds, alone on a machine.
    assert packed.counts.fill > 0.9999
    assert packed.next_fit_fill() < 0.85


def test_next_fit_is_counted_for_comparison() -> None:
    """In the order of the split: 6 | 5 | 6 4 | 5."""
    packed = pack(Split([6, 5, 6, 4, 5]), 9)
    assert packed.next_fit_fill() == 26 / 40
    assert packed.counts.fill == 26 / 30
    assert pack(Split([1]), 9).next_fit_fill() == pack(Split([1]), 9).counts.fill == 0


def test_a_conversation_is_cut_after_a_whole_turn() -> None:
    """Of ten tokens and more in rows of eight. A turn that ends with the row is whole; one that goes on is not."""
    whole, beyond = [False] * 3 + [True] * 5 + [False] * 2, [False] * 3 + [True] * 6 + [False]
    two_turns = [False, True, False, True, True, False, True, True, True, True]
    never, only_the_first = [False] * 12, [True] + [False] * 11
    packed = pack(Split([whole, beyond, two_turns, never, only_the_first]), 7)
    assert packed.starts.tolist() == [0, 20]
    assert packed.lengths.tolist() == [8, 5]
    assert dataclasses.astuple(packed.counts)[3:6] == (2, 3, 54 - 13)


def test_the_turns_of_short_conversations_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split([[False, True]] * 100 + [[False, True, False] * 10] + [[False, True]] * 100)
    packed = pack(split, 7)
    assert split.reads == [(200, 9), (0, len(split))]
    monkeypatch.setattr("gpt_jax.data.packing.CHUNK_TOKENS", 7)
    assert_same(pack(split, 7), packed)


def assert_same(ours: Packing, expected: Packing) -> None:
    assert ours.counts == expected.counts
    for a, b in zip(dataclasses.astuple(ours)[1:], dataclasses.astuple(expected)[1:], strict=True):
        assert np.array_equal(a, b)


@given(splits, lengths_of)
def test_a_packing_is_kept(tmp_path_factory: pytest.TempPathFactory, split: Split, T: int) -> None:
    folder = tmp_path_factory.mktemp("packing")
    made = open_packing(folder, "val", split, "abc", T)
    assert [path.name for path in folder.iterdir()] == [f"val-packing-{T}.bin"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack", lambda *_: pytest.fail("it was packed again"))
        found = open_packing(folder, "val", split, "abc", T)
    assert_same(found, made)
    assert not found.starts.flags.owndata  # Mapped, not read.


@pytest.mark.parametrize(
    "change",
    ["fingerprint", "length", "masks", "version", "truncated", "longer", "one byte", "a count", "empty", "a line"],
)
def test_what_does_not_belong_to_the_split_is_made_anew(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split: Split = Split([5, 3, 4, 9])
    open_packing(tmp_path, "train", split, "abc", 7)
    file, fingerprint = tmp_path / "train-packing-7.bin", "abc"
    content = file.read_bytes()
    if change == "fingerprint":
        fingerprint = "abd"
    elif change == "length":
        split = Split([5, 3, 4, 8])
    elif change == "masks":
        split = Split([[True] * n for n in (5, 3, 4, 9)])
    elif change == "version":
        monkeypatch.setattr(packing, "FORMAT_VERSION", 2)
    else:
        damaged = {
            "truncated": content[:-8],
            "longer": content + b"\0" * 8,
            "one byte": content[:-16] + b"\1" + content[-15:],
            "a count": content.replace(b'"documents": 4', b'"documents": 5'),
            "empty": b"",
            "a line": b"{}\n" + content,
        }
        file.write_bytes(damaged[change])
    assert_same(open_packing(tmp_path, "train", split, fingerprint, 7), pack(split, 7))
    monkeypatch.setattr(packing, "pack", lambda *_: pytest.fail("it was not kept"))
    open_packing(tmp_path, "train", split, fingerprint, 7)


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(arrays, "replacing", refuse)
    split = Split([5, 3, 4])
    assert_same(open_packing(tmp_path, "train", split, "abc", 7), pack(split, 7))
    assert not [*tmp_path.iterdir()]


def test_without_a_fingerprint_nothing_is_kept(tmp_path: Path) -> None:
    open_packing(tmp_path, "train", Split([5, 3, 4]), "", 7)
    assert not [*tmp_path.iterdir()]


@given(texts, lengths_of)
def test_the_same_documents_make_the_same_rows(lengths: list[int], T: int) -> None:
    """And the longest come first, so documents in another order are as many of each length in each row."""
    assert_same(pack(Split(lengths), T), pack(Split(lengths), T))

    def rows(packed: Packing) -> Counter[tuple[int, ...]]:
        return Counter(tuple(sorted(row)) for row in np.split(packed.lengths, packed.row_starts[1:-1]))

    assert rows(pack(Split(lengths), T)) == rows(pack(Split(lengths[::-1]), T))
