"""The rows of T + 1 tokens that a split is cut into, and what they need of it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpt_jax.data.batch import Batch


class Tokens(Protocol):
    """The tokens of a split, with random access: ids, where documents start, and which of them are to be learnt."""

    @property
    def is_remote(self) -> bool:
        """True if reading may wait for a network."""

    @property
    def masked(self) -> bool:
        """True if only some of the tokens are to be learnt."""

    @property
    def n_learnt(self) -> int | None:
        """The number of tokens to be learnt; None for all of them, when there is no mask."""

    @property
    def document_starts(self) -> np.ndarray:
        """The first token of each document, ascending integers (documents,)."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids of `count` tokens from `start` on, int32 (count,)."""

    def read_learnt(self, start: int, count: int) -> np.ndarray:
        """Which of `count` tokens from `start` on are to be learnt, bool (count,). Only with a mask."""


class Rows(Protocol):
    """The rows of T + 1 tokens that a source of text is cut into."""

    @property
    def tokens(self) -> Tokens:
        """The split that they are of."""

    @property
    def masked(self) -> bool:
        """True when some targets do not count."""

    @property
    def packed(self) -> bool:
        """True when a row may hold several documents that do not see each other."""

    @property
    def mean_targets(self) -> float:
        """Targets in a row that count, on average; 0 when there are none."""

    def __len__(self) -> int: ...

    def row(self, index: int, shift: int) -> Batch:
        """Row `index`: a batch without the axis B. shift: moves the borders of rows that are movable."""

    def places(self, index: int, shift: int) -> list[tuple[int, int]]:
        """Where the tokens of row `index` are in the split, in the row's order: first token and number of each part.
        What they leave of the row is padding."""


@dataclass(frozen=True)
class Stream:
    """Rows that follow each other in the split, whatever its documents.

    The tokens form a ring. Each epoch cuts it into windows of T tokens from its own offset; a row is a window and the
    token after it.
    """

    tokens: Tokens
    context_length: int

    packed = False

    @property
    def masked(self) -> bool:
        return self.tokens.masked

    @property
    def mean_targets(self) -> float:
        n, n_learnt = len(self.tokens), self.tokens.n_learnt
        return (self.context_length if n_learnt is None else self.context_length * n_learnt / n) if len(self) else 0

    def __len__(self) -> int:
        """The number of whole windows; 0 when the ring is shorter than a row."""
        return len(self.tokens) // self.context_length if len(self.tokens) > self.context_length else 0

    def places(self, index: int, shift: int) -> list[tuple[int, int]]:
        n, size = len(self.tokens), self.context_length + 1
        start = (shift + index * self.context_length) % n
        return [(start, size)] if start + size <= n else [(start, n - start), (0, start + size - n)]

    def row(self, index: int, shift: int) -> Batch:
        places = self.places(index, shift)
        tokens = np.concatenate([self.tokens.read(*place) for place in places])
        if not self.masked:
            return Batch(tokens)
        return Batch(tokens, np.concatenate([self.tokens.read_learnt(*place) for place in places])[1:])
