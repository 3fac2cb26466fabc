"""The rows of T + 1 tokens that a split is cut into, and what they need of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from gpt_jax.data.batch import Batch


class Tokens(Protocol):
    """The tokens of a split, with random access: ids, where documents start, and which of them are to be learnt."""

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


Row = TypeVar("Row", covariant=True)


class Numbered(Protocol[Row]):
    """Rows by their numbers from 0 on."""

    def __len__(self) -> int: ...

    def row(self, index: int, shift: int) -> Row:
        """One of them. shift: moves the borders of rows that are movable."""


class Rows(Numbered[Batch], Protocol):
    """The rows of T + 1 tokens that a source of text is cut into, each a batch without the axis B."""

    @property
    def masked(self) -> bool:
        """True when some targets do not count."""

    @property
    def packed(self) -> bool:
        """True when a row may hold several documents that do not see each other."""

    @property
    def mean_targets(self) -> float:
        """Targets in a row that count, on average; 0 when there are none."""


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

    def row(self, index: int, shift: int) -> Batch:
        n, T = len(self.tokens), self.context_length
        start = (shift + index * T) % n

        def around(read: Callable[[int, int], np.ndarray], start: int, count: int) -> np.ndarray:
            head = read(start, min(count, n - start))
            return head if len(head) == count else np.concatenate([head, read(0, count - len(head))])

        mask = around(self.tokens.read_learnt, (start + 1) % n, T) if self.masked else None
        return Batch(around(self.tokens.read, start, T + 1), mask)
