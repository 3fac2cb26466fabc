"""A contestant's process, and how the referee talks to it.

Every contestant is a process of its own, so that neither library holds the other's threads or memory. The process is
started with the name of a class and its arguments. The referee sends lines of JSON, which name a method to call, and
gets a line for each; the object is made when the first one comes.
"""

import importlib
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gpt_jax.system import HUGE_PAGES

ROOT = Path(__file__).parent.parent

TUNABLES = "GLIBC_TUNABLES"

ENVIRONMENT = {
    # Huge pages, as `gpt_jax train` gives itself, and what `runtime.keep_freed_memory` asks of glibc: for all.
    TUNABLES: f"{HUGE_PAGES[TUNABLES]}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**30}",
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
        """target: "module:class"; environment: variables besides ENVIRONMENT; arguments: those of the class, as JSON
        can hold them."""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", target, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the contestant's method returns. When it fails, the contestant is ended.

        Raises FailedError, or OutOfTimeError when the time of the whole run is over before there is an answer.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"method": method, "arguments": arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise FailedError(self.last_words()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            limit = limit_seconds()
            if not selector.select(limit):
                self.close(at_once=True)
                raise too_late(limit)
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise FailedError(self.last_words())
        answer = json.loads(line)
        if "error" in answer:
            self.close(at_once=True)
            raise FailedError(answer["error"])
        return answer["value"]

    def last_words(self) -> str:
        """Why the process ended, as far as is known."""
        status = self.process.wait()
        self.close()
        ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ended + last_line(self.log)

    def close(self, at_once: bool = False) -> None:
        """Ends the process: when it has done what it was asked, or at once. It may have ended already."""
        if at_once:
            self.process.kill()
        try:
            self.process.communicate(timeout=20)
        except ValueError:  # It was closed before.
            return
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def last_line(log: IO[str]) -> str:
    """The last line of what a process wrote to its log, after a colon; empty where there is none."""
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def serve(target: str, arguments: Mapping[str, Any]) -> None:
    """A contestant's process: calls the methods that the lines on standard input name."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print must not get between the answers.
    made: Any = None
    for line in sys.stdin:
        message: Mapping[str, Any] = json.loads(line)
        try:
            if made is None:
                module, _, name = target.partition(":")
                made = getattr(importlib.import_module(module), name)(**arguments)
            answer = {"value": getattr(made, message["method"])(**message["arguments"])}
        except Exception as e:
            traceback.print_exc()
            first_line = str(e).strip().partition("\n")[0][:200]
            answer = {"error": f"{type(e).__name__}: {first_line}"}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
