"""Runs the commands: as a user does, each in a process of its own, or, sooner, in the process of the tests."""

import contextlib
import io
import json
import subprocess
import sys
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
"""A model that trains in milliseconds, on any prepared data."""


def start(*args: object) -> subprocess.Popen[str]:
    """Starts `gpt-jax ARGS`."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_jax", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: object, status: int = 0) -> tuple[str, str]:
    """Runs `gpt-jax ARGS`, expects the exit status, and returns what it printed to standard output and error."""
    process = start(*args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def run_here(*args: object, status: int = 0) -> tuple[str, str]:
    """`run` without a process, which takes seconds to start: of this process's devices, the command gets as many as it
    would set up.

    What Python prints is caught; what libraries in other languages write to the terminal is not, nor are signals the
    command's own.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        devices = jax.local_devices()

        def setup(cpu_devices: int = 1) -> None:
            assert cpu_devices <= len(devices)
            patch.setattr(runtime, "local_devices", lambda: devices[:cpu_devices])

        patch.setattr(runtime, "setup", setup)
        returned = main([str(arg) for arg in args])
    assert returned == status, f"exit status {returned}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refused(*args: object, status: int = 1) -> str:
    """Runs `gpt-jax ARGS`, expects it to refuse in one line of standard error, and returns that line."""
    return _only_line(run(*args, status=status)[1])


def refused_here(*args: object, status: int = 1) -> str:
    """`refused` without a process."""
    return _only_line(run_here(*args, status=status)[1])


def _only_line(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
