"""A pool of workers: results in the order of the tasks, a bounded number of them in flight, and other workers for those
that die. The workers are those of `processes` or `ray_actors`."""

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

from gpt_jax.errors import UserError

# Workers that may die of one task. A machine that was short of memory for a moment gets over it, and a task that there
# is no memory for ends the preparation.
ATTEMPTS = 3

T = TypeVar("T")


class WorkerDeathError(Exception):
    """The message says which worker died, and how. Another worker may do its task."""

    def __init__(self, message: str, idle: bool = False) -> None:
        """idle: it died before it had a task, as many do at one time when a machine of a cluster is lost."""
        super().__init__(message)
        self.idle = idle


class Worker(Protocol):
    """Does one of `worker.JOBS`, one task at a time."""

    def when_ready(self, then: Callable[[Self], object]) -> None:
        """Calls `then` with the worker, from any thread, once a task would not wait for it to be given a place."""

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
            worker.when_ready(self._ready.put)
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

    def encode(self, tasks: Iterable[tuple[T, bytes]]) -> Iterator[tuple[T, bytes]]:
        """Yields (label, result) for each (label, task), in the same order. See `worker` for the formats.

        A worker that dies is replaced, with a note on stderr, and its task is done again. Raises UserError when that
        does not help, or when a worker gave up by itself.
        """
        pending: deque[tuple[T, Future[bytes]]] = deque()
        for label, task in tasks:
            pending.append((label, self._threads.submit(self._encode, task)))
            if len(pending) > 2 * self._n_workers:
                first, result = pending.popleft()
                yield first, result.result()
        for label, result in pending:
            yield label, result.result()

    def _encode(self, task: bytes) -> bytes:
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
                worker.when_ready(self._ready.put)

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
