"""The batch of each training step, a pure function of the step, and a thread that works ahead of the device.

A source of text gives rows of T + 1 tokens. Each epoch of a source has every row once, in a pseudo-random order that is
computed from (seed, epoch) and never stored, so any step can be reached at once, in constant memory.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.data.mixture import Mixture, Stage
from gpt_jax.data.order import ROUNDS, hash_key, permute
from gpt_jax.data.rows import Rows, Tokens

READERS = 32
"""Rows of a batch that are read at one time where that waits for a network: its windows are in as many places."""


class Source(NamedTuple):
    """One source of a mixture. Its name is for messages and logs."""

    name: str
    rows: Rows


class Drawn(NamedTuple):
    """Which row of which source a sample is; row and shift are the arguments of `Rows.row`."""

    source: int
    row: int
    shift: int


class MixedBatches:
    """The batches of a training run on one or several sources: `batches(step)` has B rows of T + 1 tokens.

    `batches(step, rows)` has only the given rows of that batch, those of one host. All batches have the fields that any
    source needs. Each source has its own order; that of the first one does not depend on the others.
    """

    def __init__(self, sources: Sequence[Source], stages: Sequence[Stage], batch_size: int, seed: int) -> None:
        """stages: the weights of the sources, see `Mixture`. Raises UserError for an impossible mixture."""
        self.sources, self.batch_size = sources, batch_size
        means = [source.rows.mean_targets for source in sources]
        self.mixture = Mixture([source.name for source in sources], means, stages, batch_size, seed)
        self._seeds = [seed, *(int(hash_key(seed, i)[0]) for i in range(1, len(sources)))]
        self._masked = any(source.rows.masked for source in sources)
        self._packed = any(source.rows.packed for source in sources)
        is_remote = any(source.rows.tokens.is_remote for source in sources)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader") if is_remote else None

    def __call__(self, step: int, rows: np.ndarray | None = None) -> Batch:
        read_all = self._readers.map if self._readers else map
        return stack([*read_all(self._read, self.drawn(step, rows))], self._masked, self._packed)

    def _read(self, drawn: Drawn) -> Batch:
        return self.sources[drawn.source].rows.row(drawn.row, drawn.shift)

    def drawn(self, step: int, rows: np.ndarray | None = None) -> list[Drawn]:
        """Where each row of a batch, or of its given rows, is from."""
        sources, numbers = self.mixture(samples_of(step, self.batch_size, rows))
        drawn: dict[int, Drawn] = {}
        for i in np.unique(sources).tolist():
            (places,) = np.nonzero(sources == i)
            found = draw(len(self.sources[i].rows), numbers[places], self._seeds[i])
            drawn |= {place: Drawn(i, *where) for place, where in zip(places.tolist(), found, strict=True)}
        return [drawn[i] for i in range(len(sources))]

    def epochs(self, step: int) -> dict[str, float]:
        """The epochs of each source that the steps before `step` passed, by its name."""
        counts = self.mixture.counts(step * self.batch_size).tolist()
        return {name: count / max(len(rows), 1) for (name, rows), count in zip(self.sources, counts, strict=True)}


def eval_batches(tokens: Tokens, context_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole split in order, with bool masks (B, T): every token but the first is a target exactly once, unless it
    is not to be learnt.

    Masked rows fill up the last batch, so that all batches have one shape.
    """
    T = context_length

    def window(index: int) -> Batch:
        start, row, mask = index * T, np.zeros(T + 1, np.int32), np.zeros(T, bool)
        count = min(T + 1, len(tokens) - start)
        row[:count] = tokens.read(start, count)
        mask[: count - 1] = tokens.read_learnt(start + 1, count - 1) if tokens.masked else True
        return Batch(row, mask)

    return in_order(window, -(-(len(tokens) - 1) // T), batch_size, packed=False)


def packed_eval_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows of a packed split in order, with masks. Masked rows fill up the last batch."""
    return in_order(lambda index: rows.row(index, 0), len(rows), batch_size, rows.packed)


def in_order(row: Callable[[int], Batch], n_rows: int, batch_size: int, packed: bool) -> Iterator[Batch]:
    """The rows 0 to n_rows - 1 in batches with masks. Masked rows fill up the last one."""
    for first in range(0, n_rows, batch_size):
        rows = [row(index) for index in range(first, min(first + batch_size, n_rows))]
        filler = Batch(np.zeros_like(rows[0].tokens), np.zeros_like(rows[0].mask))
        yield stack([*rows, *[filler] * (batch_size - len(rows))], masked=True, packed=packed)


def draw(n_rows: int, numbers: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """The index and the shift of the samples of the given numbers (n,), counted from 0 over all epochs, in the order
    of this seed."""
    drawn: dict[int, tuple[int, int]] = {}
    epochs, index = np.divmod(numbers, n_rows)
    for epoch in np.unique(epochs).tolist():  # One epoch, or several if one ends within the batch.
        (places,) = np.nonzero(epochs == epoch)
        order = permute(index[places], n_rows, seed, epoch)
        shift = int(hash_key(seed, epoch, ROUNDS)[0])  # No round has this key.
        drawn |= {i: (row, shift) for i, row in zip(places.tolist(), order.tolist(), strict=True)}
    return [drawn[i] for i in range(len(numbers))]


def samples_of(step: int, batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """The numbers of the samples of a batch, or of its given rows, int64, counted from 0 over all steps."""
    return step * batch_size + (np.arange(batch_size) if rows is None else rows)


def stack(rows: Sequence[Batch], masked: bool, packed: bool) -> Batch:
    """The batch of some rows, with the fields that it needs. Rows that lack one have what None stands for."""
    T = len(rows[0].tokens) - 1
    plain = Batch(None, np.ones(T, bool), np.zeros(T, np.int32), np.arange(T, dtype=np.int32))

    def field(name: str) -> np.ndarray:
        return np.stack([getattr(plain if getattr(row, name) is None else row, name) for row in rows])

    needed = ("tokens", *["mask"] * masked, *["segments", "positions"] * packed)
    return Batch(**{name: field(name) for name in needed})


class Prefetch:
    """Calls `make(step)` for one step after the other in a thread, and holds `depth` results ready.

    A context manager, and an iterator over the results. The iterator raises an exception of the thread in the place of
    the missing result.
    """

    def __init__(self, make: Callable[[int], Any], steps: range, depth: int = 2) -> None:
        self.results: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self.stopped = threading.Event()
        self.count = len(steps)
        self.thread = threading.Thread(target=self.work, args=(make, steps), name="prefetch", daemon=True)

    def work(self, make: Callable[[int], Any], steps: range) -> None:
        for step in steps:
            try:
                result = (True, make(step))
            except BaseException as e:
                result = (False, e)
            while not self.stopped.is_set():
                try:
                    self.results.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self.stopped.is_set() or not result[0]:
                return

    def __enter__(self) -> "Prefetch":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            succeeded, result = self.results.get()
            if not succeeded:
                raise result
            yield result
