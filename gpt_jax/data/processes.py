"""Worker processes on this machine.

They are plain subprocesses. With `multiprocessing`, children would import the caller's main module again (and JAX with
it), and idle children would outlive a parent that is killed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt_jax.data import worker
from gpt_jax.data.pool import WorkerDeathError
from gpt_jax.errors import UserError


class WorkerProcess:
    """See Worker. It runs a module of this package, by default the one that does one of `worker.JOBS`."""

    def __init__(self, *arguments: str, module: str = worker.__name__) -> None:
        package = str(Path(worker.__file__).parents[2])
        search_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,  # The parent handles Ctrl-C.
        )

    def __call__(self, task: bytes) -> bytes:
        """See Worker."""
        return next(self.results(task))

    def results(self, task: bytes) -> Iterator[bytes]:
        """The results of a task that has several, without end. Raises as a call does."""
        idle = self._process.poll() is not None
        try:
            worker.send(self._process.stdin, task)
            while True:
                yield worker.receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            if status >= 0:
                raise UserError(f"a worker process ended with status {status}") from None
            advice = " (is memory short?)" if status == -signal.SIGKILL else ""
            raise WorkerDeathError(
                f"a worker process was killed by {signal.Signals(-status).name}{advice}", idle
            ) from None

    def kill(self) -> None:
        """See Worker."""
        if self._process.returncode is None:  # Then the number is still its own.
            with suppress(ProcessLookupError, PermissionError):  # macOS denies the group of one that has just ended.
                os.killpg(self._process.pid, signal.SIGKILL)  # With what it has started.

    def close(self) -> None:
        """See Worker."""
        self._process.communicate()  # It takes what is left in the pipes, so that closing them raises no error.
