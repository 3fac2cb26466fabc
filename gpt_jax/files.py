"""Files and folders that are there whole or not at all, and folders that one process at a time may write to."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place at the end, flushed to the disk; removed on errors."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:  # As write() fails where the disk is full.
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def save_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_replaceable(folder: Path, marker: str, force: bool) -> None:
    """Raises UserError unless `folder` may be written: it is not there, is empty, or is one of ours and `force` is set.

    Ours is a folder that holds a file `marker`; no other is ever replaced, whatever it is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / marker).is_file():
        raise UserError(f"{folder} exists and was not written by this command; choose another --out")
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
    with locked(partial, f"another process is writing {folder}; wait for it"):
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


@contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Keeps `folder`, made if need be, to this process for the block. While another has it, UserError(message).

    The lock binds only those who ask for it, and ends with the process that holds it, however that ends.
    """
    descriptor = _lock(folder, message)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, message: str) -> int:
    """Makes `folder`, and locks it until the descriptor returned is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before it was locked, the folder may have been renamed or deleted by the process that had it.
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(message) from None
        os.close(descriptor)


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
