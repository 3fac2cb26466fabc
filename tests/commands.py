"""Runs the commands: each in its own process, as a user does, or faster, in the process of the tests."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from gpt_jax import runtime
from gpt_jax.cli.main import main

ROOT = Path(__file__).parent.parent

TINY = [
    "--model.n-layer=1",
    "--model.n-head=2",
    "--model.d-model=16",
    "--model.context-length=16",
    "--data.batch-size=8",
    "--optimizer.warmup-steps=2",
    "--train.log-every=1",
]
"""Flags of a model that trains in milliseconds, on any prepared data."""

OLDER_GENERATOR = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
"""XLA's flag for the generator of code by which the processes of the tests compile."""


def environment() -> dict[str, str]:
    """The variables of a command in a process of its own. It compiles as a user's does, but with `quick_commands`."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        flags = flags.replace(OLDER_GENERATOR, "")
    return {**os.environ, "XLA_FLAGS": flags}


def start(*args: object, first: str = "", stdin: int | None = None) -> subprocess.Popen[str]:
    """Starts `gpt-jax ARGS`, after the statement `first`, which may change a constant. stdin: as Popen takes it."""
    program = ("-c", f"{first}; from gpt_jax.cli.main import run; run()") if first else ("-m", "gpt_jax")
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        cwd=ROOT,
        env=environment(),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: object, status: int = 0) -> tuple[str, str]:
    """Runs `gpt-jax ARGS`, expects the exit status, and returns its standard output and standard error."""
    process = start(*args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def wait_for(condition: Callable[[], object]) -> None:
    """Returns once it holds, within two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def set_up_here() -> Iterator[None]:
    """What would set up JAX for a command gives it as many of this process's devices."""
    devices = jax.local_devices()
    with pytest.MonkeyPatch.context() as patch:

        def setup(cpu_devices: int = 1) -> None:
            assert cpu_devices <= len(devices)
            patch.setattr(runtime, "local_devices", lambda: devices[:cpu_devices])

        patch.setattr(runtime, "setup", setup)
        yield


def run_here(*args: object, status: int = 0, cwd: Path = ROOT) -> tuple[str, str]:
    """`run` in the process of the tests, since a new one takes seconds to start. The command gets as many of this
    process's devices as it would set up. cwd: its working folder.

    The output of Python is caught, that of libraries in other languages is not. Signals go to the process of the tests,
    not to the command.
    """
    out, err = io.StringIO(), io.StringIO()
    with set_up_here(), contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = main([str(arg) for arg in args])
    assert returned == status, f"exit status {returned}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refused(*args: object, status: int = 1) -> str:
    """Runs `gpt-jax ARGS`, expects an error in one line of standard error, and returns that line."""
    return _only_line(run(*args, status=status)[1])


def refused_here(*args: object, status: int = 1, cwd: Path = ROOT) -> str:
    """`refused` in the process of the tests."""
    return _only_line(run_here(*args, status=status, cwd=cwd)[1])


def _only_line(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, without an unfinished last line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
