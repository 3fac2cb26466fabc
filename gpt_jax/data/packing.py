"""Document packing: whole documents side by side in rows of T + 1 tokens, and a file that keeps which are where.

A packing is a pure function of the split and the context length T. Texts that are longer than a row are cut into
windows; conversations are cut after their last turn that fits. A document in a row sees nothing of the others, and its
first token is no target.
"""

import bisect
import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.data.rows import Tokens
from gpt_jax.data.shards import SplitName
from gpt_jax.storage.arrays import load_array, save_array

FORMAT_VERSION = 2
CHUNK_TOKENS = 1 << 24
"""Tokens whose mask is read at one time when all of it is counted."""


@dataclass(frozen=True)
class PackingCounts:
    """What packing did to a split."""

    context_length: int
    documents: int
    tokens: int
    cut: int  # Documents longer than a row: texts cut into windows, conversations cut after a turn.
    dropped: int  # Documents without a target, or whose first turn that is to be learnt does not fit.
    lost: int  # Tokens that are in no row.
    pieces: int
    rows: int
    used: int  # Places of rows that hold a token; the first token of a window is in the one before it, too.
    targets: int

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token."""
        return self.used / max(self.rows * (self.context_length + 1), 1)


@dataclass(frozen=True)
class Packing:
    """The pieces of documents in each row: those of row r are the entries row_starts[r] to row_starts[r + 1] - 1."""

    counts: PackingCounts
    row_starts: np.ndarray  # int64 (rows + 1,).
    starts: np.ndarray  # int64 (pieces,): the first token of each piece, in the split.
    lengths: np.ndarray  # int64 (pieces,): its tokens, 2 to T + 1.

    def next_fit_fill(self) -> float:
        """The fill of rows that take the same pieces in the order of the split, each until one does not fit."""
        capacity, rows, space = self.counts.context_length + 1, 0, 0
        for length in self.lengths[np.argsort(self.starts)].tolist():
            if length > space:
                rows, space = rows + 1, capacity
            space -= length
        return self.counts.used / max(rows * capacity, 1)


def pack(tokens: Tokens, context_length: int) -> Packing:
    """Packs the documents of a split into rows of context_length + 1 tokens."""
    T = context_length
    starts = tokens.document_starts.astype(np.int64)
    lengths = np.diff(starts, append=len(tokens))
    too_long = lengths > T + 1
    if tokens.masked:
        for i in np.flatnonzero(too_long):
            learnt = tokens.read_learnt(int(starts[i]), T + 2)
            ends = np.flatnonzero(learnt[:-1] & ~learnt[1:]) + 1
            lengths[i] = ends[-1] if len(ends) else 0

    n_pieces = np.maximum(-(-(lengths - 1) // T), 0)  # Windows overlap by one token, the last target of the first.
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    piece_starts = starts[document] + nth * T
    piece_lengths = np.minimum(lengths[document] - nth * T, T + 1)
    targets = piece_lengths - 1
    if tokens.masked:
        places = np.stack((piece_starts + 1, piece_starts + piece_lengths), axis=1)
        targets = np.diff(learnt_before(tokens, places.ravel()).reshape(-1, 2))[:, 0]
    kept = targets > 0
    document, piece_starts, piece_lengths = document[kept], piece_starts[kept], piece_lengths[kept]

    row = best_fit_decreasing(piece_lengths, T + 1)
    in_rows = np.argsort(row, kind="stable")
    row_starts = np.concatenate(([0], np.cumsum(np.bincount(row))))
    packed = np.unique(document)
    used = int(piece_lengths.sum())
    counts = PackingCounts(
        context_length=T,
        documents=len(starts),
        tokens=len(tokens),
        cut=int(too_long[packed].sum()),
        dropped=len(starts) - len(packed),
        lost=len(tokens) - used + len(document) - len(packed),
        pieces=len(document),
        rows=len(row_starts) - 1,
        used=used,
        targets=int(targets.sum()),
    )
    return Packing(counts, row_starts, piece_starts[in_rows], piece_lengths[in_rows])


def learnt_before(tokens: Tokens, places: np.ndarray) -> np.ndarray:
    """The number of tokens to be learnt before each of the ascending places (n,), int64 (n,)."""
    counts, total = np.empty(len(places), np.int64), 0
    for start in range(0, len(tokens) + 1, CHUNK_TOKENS):
        learnt = tokens.read_learnt(start, min(CHUNK_TOKENS, len(tokens) - start))
        before = total + np.concatenate(([0], np.cumsum(learnt)))
        here = slice(*np.searchsorted(places, (start, start + CHUNK_TOKENS)))
        counts[here] = before[places[here] - start]
        total = before[-1]
    return counts


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each length (n,), int64 (n,): longest first, each into the fullest row with space for it, or into a
    new row. No length is more than `capacity`.

    Best-fit decreasing (Johnson 1973), of all pieces of a length and all rows of a space at once: it takes 11/9 of the
    fewest possible rows and 4 more at most.
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    spaces: list[int] = []  # Of the rows that are not full, ascending.
    rows_with: dict[int, list[np.ndarray]] = {}

    def put_back(space: int, rows: np.ndarray) -> None:
        if space and len(rows):
            if not rows_with.setdefault(space, []):
                bisect.insort(spaces, space)
            rows_with[space].append(rows)

    n_rows = done = 0
    sizes, repeats = np.unique(lengths, return_counts=True)
    for length, count in zip(sizes[::-1].tolist(), repeats[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            i = bisect.bisect_left(spaces, length)
            if i == len(spaces):
                new = -(-(end - done) // (capacity // length))
                put_back(capacity, np.arange(n_rows, n_rows + new))
                n_rows += new
            space = spaces[i]
            rows = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[i]
            # A row that has just taken a piece is the fullest, so it takes as many as have space in it.
            each = min(space // length, end - done)
            taking, others = np.split(rows, [(end - done) // each])
            row_of[order[done : done + each * len(taking)]] = np.repeat(taking, each)
            done += each * len(taking)
            put_back(space - each * length, taking)
            put_back(space, others)
    return row_of


def open_packing(folder: Path, name: SplitName, tokens: Tokens, fingerprint: str, context_length: int) -> Packing:
    """The packing of a split of a data folder, from its file, which is made if it is missing, damaged or not of these
    tokens, and if the folder can be written.

    fingerprint: that of the split; without one, nothing is known to belong to it, and no file is used.
    """
    file = folder / f"{name}-packing-{context_length}.bin"
    key = [FORMAT_VERSION, fingerprint, tokens.masked, len(tokens), len(tokens.document_starts), context_length]
    if fingerprint and (saved := load_array(file, key)):
        counts = PackingCounts(**saved[0])
        return Packing(counts, *np.split(saved[1], np.cumsum([counts.rows + 1, counts.pieces])))
    packing = pack(tokens, context_length)
    if fingerprint:
        # On a read-only folder or a full disk, the packing is made anew each time, to the same effect.
        with contextlib.suppress(OSError):
            values = np.concatenate((packing.row_starts, packing.starts, packing.lengths)).astype(np.int64)
            save_array(file, key, dataclasses.asdict(packing.counts), values)
    return packing


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packing. What a row does not use is padding of token 0, which is no target and a segment of its
    own."""

    tokens: Tokens
    packing: Packing

    masked = packed = True

    @property
    def mean_targets(self) -> float:
        return self.packing.counts.targets / max(len(self), 1)

    def __len__(self) -> int:
        return self.packing.counts.rows

    def places(self, index: int, shift: int) -> list[tuple[int, int]]:
        here = slice(self.packing.row_starts[index], self.packing.row_starts[index + 1])
        starts, lengths = self.packing.starts[here], self.packing.lengths[here]
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def row(self, index: int, shift: int) -> Batch:
        size, pieces = self.packing.counts.context_length + 1, self.places(index, shift)
        lengths = [length for _, length in pieces]
        used = sum(lengths)
        tokens, learnt = np.zeros(size, np.int32), np.zeros(size, bool)
        np.concatenate([self.tokens.read(*piece) for piece in pieces], out=tokens[:used])
        learnt[:used] = (
            np.concatenate([self.tokens.read_learnt(*piece) for piece in pieces]) if self.tokens.masked else True
        )
        begins = np.cumsum([0, *lengths])  # Of all pieces, and of the padding.
        segments = np.repeat(np.arange(len(begins), dtype=np.int32), [*lengths, size - used])
        positions = (np.arange(size) - begins[segments]).astype(np.int32)
        return Batch(tokens, learnt[1:] & (positions[1:] > 0), segments[:-1], positions[:-1])
