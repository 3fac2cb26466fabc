"""Runs the commands as a user does, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def refused(*args: object, status: int = 1) -> str:
    """Runs `gpt-jax ARGS`, expects it to refuse in one line of standard error, and returns that line."""
    _, err = run(*args, status=status)
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
