"""Cuts text of any length into windows that fit the model, each token scored exactly once, and batches them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.sample.decode import bucket


class Window(NamedTuple):
    """Tokens that the model reads at one time. Each but the first is a target, predicted from those before it."""

    tokens: np.ndarray  # int32 (n + 1,)
    seen: int  # Number of first targets that are only context, and not scored.
    learnt: np.ndarray | None = None  # bool (n,): which of the targets count; None: all.

    @property
    def scored(self) -> np.ndarray:
        """Which targets are scored, bool (n,)."""
        new = np.arange(len(self.tokens) - 1) >= self.seen
        return new if self.learnt is None else new & self.learnt

    @property
    def n_scored(self) -> int:
        """The number of targets that are scored."""
        return int(self.scored.sum())


def windows(pieces: Iterable[np.ndarray], context_length: int, stride: int) -> Iterator[Window]:
    """The windows over one text, given as int32 pieces; every token but the first is scored exactly once.

    Windows have context_length targets, the last one perhaps fewer, and start `stride` tokens apart: each target after
    the first window is predicted from context_length - stride tokens or more. At most a window and a piece are in
    memory.
    """
    held, seen = np.empty(0, np.int32), 0
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) > context_length:
            yield Window(held[: context_length + 1], seen)
            held, seen = held[stride:], context_length - stride
    if len(held) - 1 > seen:
        yield Window(held, seen)


def masked_windows(tokens: np.ndarray, learnt: np.ndarray, context_length: int, stride: int) -> Iterator[Window]:
    """The windows over one document with a mask, of which each token that is to be learnt, but the first, is scored.
    Those with nothing to score are left out."""
    for i, window in enumerate(windows([tokens], context_length, stride)):
        begin = i * stride + 1
        masked = window._replace(learnt=learnt[begin : begin + len(window.tokens) - 1])
        if masked.n_scored:
            yield masked


def batches(
    windows: Iterable[Window], batch_size: int, context_length: int, least: int
) -> Iterator[tuple[list[int], Batch]]:
    """The windows in batches of `batch_size`, each yielded as soon as it is full, in few shapes.

    Yields the numbers of the windows in a batch, and the batch; its mask, bool (B, T), has the targets to score.
    Windows are padded to `least` times a power of two, but no further than to context_length. Masked rows, which have
    no number, fill up the last batch of each length.
    """
    waiting: dict[int, list[tuple[int, Window]]] = {}
    for numbered in enumerate(windows):
        steps = -(-(len(numbered[1].tokens) - 1) // least)
        T = min(context_length, least * bucket(steps, context_length, 1))
        rows = waiting.setdefault(T, [])
        rows.append(numbered)
        if len(rows) == batch_size:
            yield filled(waiting.pop(T), T, batch_size)
    for T, rows in sorted(waiting.items()):
        yield filled(rows, T, batch_size)


def filled(rows: list[tuple[int, Window]], T: int, batch_size: int) -> tuple[list[int], Batch]:
    """The numbers of the given windows, and one batch (batch_size, T) of them."""
    batch = Batch(np.zeros((batch_size, T + 1), np.int32), np.zeros((batch_size, T), bool))
    for row, (_, window) in enumerate(rows):
        batch.tokens[row, : len(window.tokens)] = window.tokens
        batch.mask[row, : len(window.tokens) - 1] = window.scored
    return [number for number, _ in rows], batch
