"""A short soak of each model, in a process of its own, whose programs are compiled as users' are; see soak.py."""

import re
import subprocess
import sys

import pytest

from tests.cases import cases
from tests.commands import ROOT, environment
from tests.sample.engines import MODELS


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(MODELS, ["gemma"]))
def test_a_short_soak(name: str) -> None:
    """Answers among random neighbours are those alone, to the last bit."""
    command = [sys.executable, "-m", "tests.sample.soak", "--requests", "500", "--checked", "100", "--model", name]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 programs compiled" in done.stdout
    [compared] = re.findall(r"(\d+) of them compared", done.stdout)
    assert int(compared) > 50
