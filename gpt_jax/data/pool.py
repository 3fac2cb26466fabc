"""Tokenising on all cores: worker processes, results in the order of the texts, and a bounded number in flight.

The workers are plain subprocesses. With `multiprocessing`, children would import the caller's main module again (and
JAX with it), and idle children would outlive a parent that is killed.
"""

import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from gpt_jax.data import worker
from gpt_jax.errors import UserError

T = TypeVar("T")


class WorkerPool:
    """Processes that do one of `worker.JOBS`, made of `argument`. Use it in a `with` block, which ends them."""

    def __init__(self, job: str, argument: str, n_workers: int) -> None:
        package = str(Path(worker.__file__).parents[2])
        search_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", worker.__name__, job, argument],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": search_path},
                start_new_session=True,  # The parent handles Ctrl-C.
            )
            for _ in range(n_workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._workers:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(n_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._workers:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._workers:
            process.communicate()

    def encode(self, texts: Iterable[tuple[T, bytes]]) -> Iterator[tuple[T, bytes]]:
        """Yields (label, result) for each (label, task), in the same order. See `worker` for the formats.

        Raises UserError when a worker dies.
        """
        pending: deque[tuple[T, Future[bytes]]] = deque()
        for label, text in texts:
            pending.append((label, self._threads.submit(self._encode, text)))
            if len(pending) > 2 * len(self._workers):
                first, tokens = pending.popleft()
                yield first, tokens.result()
        for label, tokens in pending:
            yield label, tokens.result()

    def _encode(self, text: bytes) -> bytes:
        process: Any = self._idle.get()
        try:
            worker.send(process.stdin, text)
            return worker.receive(process.stdout)
        except (EOFError, BrokenPipeError):
            status = process.wait()
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            advice = "; is memory short?" if status == -signal.SIGKILL else ""
            raise UserError(f"a worker process {how}{advice}") from None
        finally:
            self._idle.put(process)
