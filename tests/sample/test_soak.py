"""A short soak, in a process of its own, whose programs are compiled as users' are; see soak.py."""

import subprocess
import sys

import pytest

from tests.commands import ROOT, environment


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_short_soak(name: str) -> None:
    command = [sys.executable, "-m", "tests.sample.soak", "--requests", "200", "--checked", "20", "--model", name]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 programs compiled" in done.stdout
