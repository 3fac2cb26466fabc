"""Folders that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_jax.errors import UserError


def check_replaceable(folder: Path, marker: str, force: bool) -> None:
    """Raises UserError unless `folder` may be written: it is not there, is empty, or is one of ours and `force` is set.

    Ours is a folder that holds a file `marker`; no other is ever replaced, whatever it is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / marker).is_file():
        raise UserError(f"{folder} exists and is not a data folder; choose another --out")
    if not force:
        raise UserError(f"{folder} exists; --force replaces it when the new one is complete")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder for files, which takes the place of `folder` when the block ends, and vanishes when it fails.

    It stands beside its place as `.NAME.partial`, locked. What a killed process left there is cleared first; while
    another one writes there, UserError. What `folder` held is kept until then, and deleted afterwards.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(partial)
    try:
        _put_back(old, folder)  # Where a process was killed between the two renames below.
        for leftover in partial.iterdir():
            leftover.unlink()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        _put_back(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """Makes `folder`, and locks it until the descriptor returned is closed or the process dies."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another process is writing {folder}; wait for it") from None
        # Between the two calls it may have been renamed to its final place, or deleted.
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
        os.close(lock)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def _sync(path: Path) -> None:
    """Has a file's content, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
