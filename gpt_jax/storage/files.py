"""Files and folders that are written whole or not at all, and locks that keep a folder to one process."""

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it at the end, flushed to the disk; removed on errors."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:  # From write(), on a full disk.
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def is_utf8(name: str) -> bool:
    """False when a name stands for bytes that are not UTF-8, which `os.fsdecode` makes halves of surrogate pairs."""
    return name.encode(errors="ignore").decode() == name


def save_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON in UTF-8. The surrogates of file names that are not UTF-8 are escaped, which is JSON, too;
    they come back when it is read."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sibling_like(path: Path) -> Path | None:
    """The entry beside a path that is not there whose name is most like its own: the one that may be meant. None when
    no name is like it, and when the folder cannot be read."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return None
    return next((path.parent / name for name in difflib.get_close_matches(path.name, names, n=1)), None)


def check_writable(folder: Path) -> None:
    """Raises OSError when no file can be made in `folder`, or in the nearest folder above it that is there."""
    absolute = folder.absolute()
    with tempfile.TemporaryFile(dir=next(path for path in (absolute, *absolute.parents) if path.exists())):
        pass


def check_replaceable(folder: Path, marker: str, force: bool) -> None:
    """Raises UserError unless `folder` may be written: it is missing or empty, or it is ours and `force` is set.

    A folder is ours if it holds a file `marker`. Any other is never replaced.
    """
    try:
        check_writable(folder.parent)
    except OSError as e:  # It names the temporary file.
        raise UserError(f"{folder} could not be written ({e.strerror or e})") from e
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / marker).is_file():
        raise UserError(f"{folder} exists and was not written by this command; choose another --out")
    if not force:
        raise UserError(f"{folder} exists; --force replaces it when the new one is complete")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder for files, which replaces `folder` when the block ends, and is deleted when the block fails.

    It is `.NAME.partial` beside `folder`, cleared of the files of a killed process; `.NAME.lock` is its lock. The old
    content of `folder` is kept until it is replaced. Raises UserError while another process writes the folder.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    with locked(folder.with_name(f".{folder.name}.lock"), f"another process is writing {folder}; wait for it"):
        try:
            _put_back(old, folder)  # A process may have been killed between the two renames below.
            partial.mkdir(exist_ok=True)
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
def locked(file: Path, message: str) -> Iterator[None]:
    """Locks `file`, made if need be, for the block. Raises UserError(message) while another process has it.

    The lock is advisory, and ends with the process that holds it, however that ends; the file stays, since removing it
    would let two processes lock two files of its name. On file systems without such locks, filelock lets the file's
    existence be the lock, which then outlives a killed process on other machines; it says so.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(message) from None
    try:
        yield
    finally:
        lock.release()


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def _sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
