"""A contestant's process, and how the referee talks to it.

Every contestant is a process of its own, so that neither library holds the other's threads or memory. The process is
started with the name of a class. Over a connection, which carries Python's objects, it gets the arguments of the class,
then methods to call with their arguments, and gives an answer to each; the object is made when the first one comes.
"""

import contextlib
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from gpt_jax.system import HUGE_PAGES

ROOT = Path(__file__).parent.parent

ENVIRONMENT = {
    # Huge pages, as `gpt_jax train` gives itself, and what `runtime.keep_freed_memory` asks of glibc: for all.
    "GLIBC_TUNABLES": f"{HUGE_PAGES['GLIBC_TUNABLES']}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**30}",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # Compile times are those of a first run, on both sides.
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # The contestants share the GPU's memory.
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}

LIMIT_SECONDS = 900.0
"""What takes longer than this has failed."""

GRACE_SECONDS = 60.0
"""So long after the deadline a contestant is still waited for."""

deadline = math.inf
"""When the time of the whole run is over, on the clock time.monotonic(). The referee sets it once, as it begins."""


class FailedError(Exception):
    """A contestant could not do what it was asked: it ran out of memory, does not run here, or took too long."""


class OutOfTimeError(Exception):
    """The time of the whole run is over, through no fault of a contestant."""


def time_is_over() -> bool:
    """Whether nothing is to begin any more."""
    return time.monotonic() > deadline


def limit_seconds() -> float:
    """How long a contestant is waited for, from now on."""
    return max(0.0, min(LIMIT_SECONDS, deadline + GRACE_SECONDS - time.monotonic()))


def too_late(limit: float) -> FailedError | OutOfTimeError:
    """What to raise when a contestant was waited for so long, in vain."""
    return OutOfTimeError("the time is over") if time_is_over() else FailedError(f"no answer within {limit:.0f} s")


class Worker:
    """A contestant, as the referee sees it. A context manager: leaving it ends the process."""

    def __init__(self, target: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> None:
        """target: "module:class"; environment: variables besides ENVIRONMENT; arguments: those of the class."""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the worker)
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", target, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
            )
        with contextlib.suppress(OSError):  # One that has ended already says so when it is asked.
            self.connection.send(arguments)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the contestant's method returns. When it fails, the contestant is ended.

        Raises FailedError, or OutOfTimeError when the time of the whole run is over before there is an answer.
        """
        limit = limit_seconds()
        try:
            self.connection.send((method, arguments))
            if not self.connection.poll(limit):
                self.close(at_once=True)
                raise too_late(limit)
            value, error = self.connection.recv()
        except (OSError, EOFError):
            status = self.process.wait()
            ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise FailedError(ended + last_line(self.log)) from None
        if error:
            self.close(at_once=True)
            raise FailedError(error)
        return value

    def close(self, at_once: bool = False) -> None:
        """Ends the process: when it has done what it was asked, or at once. It may have ended already."""
        if at_once:
            self.process.kill()
        self.connection.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def last_line(log: IO[str]) -> str:
    """The last line of what a process wrote to its log, after a colon; empty where there is none."""
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def serve(target: str, connection: Connection) -> None:
    """A contestant's process: calls the methods that come over the connection, until it is closed."""
    made, arguments = None, connection.recv()
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            if made is None:
                module, _, name = target.partition(":")
                made = getattr(importlib.import_module(module), name)(**arguments)
            answer = getattr(made, method)(**given), ""
        except Exception as e:
            traceback.print_exc()
            answer = None, f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"
        connection.send(answer)
        del given, answer  # Which may be arrays, and would count as the contestant's memory until the next message.


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])))
