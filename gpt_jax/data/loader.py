"""The batch of each training step, a pure function of the step, and a thread that works ahead of the device.

The tokens of a split form a ring. Each epoch cuts the ring into windows of T tokens, from its own offset, and
visits every window once, in a pseudo-random order. Order and offset are computed from (seed, epoch) and never stored,
so any step can be reached at once, in constant memory.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.errors import UserError

MASK_64 = (1 << 64) - 1
ROUNDS = 6  # Four are enough for a permutation to look random; two more cost nothing here.


class Tokens(Protocol):
    """A sequence of token ids with random access."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray: ...


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) of uint64 values: a hash whose every bit is well mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int) -> np.ndarray:
    """A uint64 hash, shape (1,), of all parts and their order."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key + np.uint64((part * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK_64))
    return key


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The image of each index under a permutation of range(n) chosen by `key`, which is never held in memory.

    A Feistel network (Luby and Rackoff 1988) of ROUNDS rounds permutes the smallest 2**(2k) >= n values. A value
    outside range(n) is permuted again until it is inside (cycle walking, Black and Rogaway 2002), fewer than four times
    on average.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = [hash_key(*key, r) for r in range(ROUNDS)]
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        out[outside] = (left << shift) | right
        outside = out >= n
    return out.astype(np.int64)


@dataclass(frozen=True)
class TrainBatches:
    """The batches of a training run: `batches(step)` has B windows of T + 1 tokens, all but the first of them targets.

    `batches(step, rows)` has only the given rows of that batch, those of one host. Raises UserError when the split is
    smaller than one window.
    """

    tokens: Tokens
    context_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < self.context_length + 1:
            raise UserError(
                f"the training split has {len(self.tokens)} tokens, less than one window of "
                f"model.context_length + 1 = {self.context_length + 1}; use more text or a shorter context"
            )

    @property
    def windows_per_epoch(self) -> int:
        """The number of whole windows that the ring is cut into."""
        return len(self.tokens) // self.context_length

    def starts(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """The position of the first token of each window of the batch, or of its given rows, int64."""
        n, n_windows = len(self.tokens), self.windows_per_epoch
        sample = step * self.batch_size + (np.arange(self.batch_size) if rows is None else rows)
        epochs, index = np.divmod(sample, n_windows)
        starts = np.empty(len(sample), np.int64)
        for epoch in np.unique(epochs):  # One epoch, or several if one ends within the batch.
            in_epoch = epochs == epoch
            window = permute(index[in_epoch], n_windows, self.seed, int(epoch))
            offset = int(hash_key(self.seed, int(epoch), ROUNDS)[0] % np.uint64(n))  # No round has this key.
            starts[in_epoch] = (offset + window * self.context_length) % n
        return starts

    def __call__(self, step: int, rows: np.ndarray | None = None) -> Batch:
        return Batch(np.stack([self.window(int(start)) for start in self.starts(step, rows)]))

    def window(self, start: int) -> np.ndarray:
        """T + 1 tokens from `start` on, which continue at the beginning of the split after its end."""
        count = self.context_length + 1
        head = self.tokens.read(start, min(count, len(self.tokens) - start))
        return head if len(head) == count else np.concatenate([head, self.tokens.read(0, count - len(head))])


def eval_batches(tokens: Tokens, context_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole split in order, with bool masks (B, T): every token but the first is a target exactly once.

    Masked rows fill up the last batch, so that all batches have one shape.
    """
    T = context_length
    n_windows = -(-(len(tokens) - 1) // T)
    for first in range(0, n_windows, batch_size):
        rows = np.zeros((batch_size, T + 1), np.int32)
        mask = np.zeros((batch_size, T), bool)
        for row in range(min(batch_size, n_windows - first)):
            start = (first + row) * T
            window = tokens.read(start, min(T + 1, len(tokens) - start))
            rows[row, : len(window)] = window
            mask[row, : len(window) - 1] = True
        yield Batch(rows, mask)


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
