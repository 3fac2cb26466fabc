"""A pool of workers: results in the order of the tasks, a bounded number of them in flight, and other workers for those
that die."""

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

from gpt_jax.data.pieces import Piece
from gpt_jax.errors import UserError

# Workers that may die of one task. A machine that was short of memory for a moment gets over it, and a task that there
# is no memory for ends the preparation.
ATTEMPTS = 3


class WorkerDeathError(Exception):
    """The message says which worker died, and how. Another worker may do its task."""

    def __init__(self, message: str, idle: bool = False) -> None:
        """idle: it died before it had a task, as several may when memory is short."""
        super().__init__(message)
        self.idle = idle


class Worker(Protocol):
    """Does one of `worker.JOBS`, one task at a time."""

    def __call__(self, task: bytes) -> bytes:
        """The result of a task. Raises WorkerDeathError, and UserError when the worker gave up by itself."""

    def kill(self) -> None:
        """Ends the worker, at once. A call in another thread raises WorkerDeathError."""

    def close(self) -> None:
        """Frees what belongs to a worker that was killed, when nobody calls it any more."""


class WorkerPool:
    """Workers that `start` makes. Use it in a `with` block, which ends them."""

    def __init__(self, start: Callable[[], Worker], n_workers: int) -> None:
        self._start = start
        self._n_workers = n_workers
        self._workers: set[Worker] = set()
        self._ready: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(n_workers)
        self._ending = False
        self._lock = threading.Lock()  # So that none is started while all are killed.

    def __enter__(self) -> Self:
        self._workers |= {self._start() for _ in range(self._n_workers)}
        for worker in self._workers:
            self._ready.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ending = True
            for worker in self._workers:
                worker.kill()
                self._ready.put(worker)  # For a thread that waits for one.
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def results(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bytes]]:
        """Yields each piece, in the same order, with the result of its content if it is a task, else with its content.
        See `worker` for the formats.

        A worker that dies is replaced, with a note on stderr, and its task is done again. Raises UserError when that
        does not help, or when a worker gave up by itself.
        """
        pending: deque[tuple[Piece, Future[bytes] | None]] = deque()

        def first() -> tuple[Piece, bytes]:
            piece, result = pending.popleft()
            return piece, piece.content if result is None else result.result()

        for piece in pieces:
            pending.append((piece, self._threads.submit(self._result, piece.content) if piece.is_task else None))
            while len(pending) > 2 * self._n_workers or (pending and pending[0][1] is None):
                yield first()
        while pending:
            yield first()

    def _result(self, task: bytes) -> bytes:
        n_idle = n_busy = 0  # Deaths.
        while True:
            worker = self._ready.get()
            try:
                return worker(task)
            except WorkerDeathError as e:
                n_idle, n_busy = n_idle + e.idle, n_busy + (not e.idle)
                if self._ending or n_busy == ATTEMPTS or n_idle > self._n_workers:
                    raise UserError(f"{e}, number {n_idle + n_busy} of the workers that had this task") from None
                print(f"{e}; another one is started", file=sys.stderr)
                worker = self._in_place_of(worker)
            finally:
                self._ready.put(worker)

    def _in_place_of(self, worker: Worker) -> Worker:
        """A new worker for one that died; that one itself while the pool ends."""
        with self._lock:
            if self._ending:
                return worker
            self._workers.remove(worker)
            worker.kill()  # It may be alive, and its result lost.
            worker.close()
            new = self._start()
            self._workers.add(new)
            return new
