"""The windows that training sees at a step, and the documents in them."""

import itertools
from typing import NamedTuple

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import MixedBatches
from gpt_jax.data.rows import Tokens


class Piece(NamedTuple):
    """The part of one document in a window. Documents, and tokens of a document, are counted from 1."""

    document: int  # Its number in the training split.
    first: int  # The number of its first token in the document.
    length: int  # Tokens.
    whole: int  # Tokens of the whole document.


class Window(NamedTuple):
    """A row of a batch, and where it is from."""

    folder: str
    masked: bool  # True if only some tokens of the folder are to be learnt.
    row: Batch  # Without the axis B.
    pieces: list[Piece]  # In order; after them comes padding.

    @property
    def learnt(self) -> np.ndarray:
        """Which tokens are targets that count, bool (T + 1,). The first token is none, since nothing is before it."""
        T = len(self.row.tokens) - 1
        return np.concatenate(([False], np.ones(T, bool) if self.row.mask is None else self.row.mask))


def windows(batches: MixedBatches, step: int) -> list[Window]:
    """The rows of the batch of a step, which are counted from 1 as in metrics.jsonl: `batches(step - 1)`."""
    batch, found = batches(step - 1), []
    for i, (source, row, shift) in enumerate(batches.drawn(step - 1)):
        name, rows = batches.sources[source]
        parts = [pieces(rows.tokens, *place) for place in rows.places(row, shift)]
        fields = (None if field is None else field[i] for field in batch)
        found.append(Window(name, rows.tokens.masked, Batch(*fields), [piece for part in parts for piece in part]))
    return found


def pieces(tokens: Tokens, start: int, count: int) -> list[Piece]:
    """The parts of documents of which `count` tokens of a split from `start` on consist."""
    starts, end = tokens.document_starts, start + count
    first, last = int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, end, "left"))
    bounds = [*map(int, starts[first : last + 1]), *[len(tokens)] * (last == len(starts))]
    found = []
    for i, (begin, stop) in enumerate(itertools.pairwise(bounds)):
        here = max(start, begin)
        found.append(Piece(first + i + 1, here - begin + 1, min(end, stop) - here, stop - begin))
    return found
