"""Remote folders that are there whole or not at all: a marker, the last of their files, says that they are whole."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath, RemotePath

UNFINISHED = ".unfinished"
"""The file that says that a folder without a marker is one of ours, which may be replaced."""


def check_remote_replaceable(folder: RemotePath, marker: str, force: bool) -> None:
    """Raises UserError unless `folder` may be written: there is nothing in it, or it is ours and `force` is set.

    A folder is ours if it holds a file `marker`, or was left unfinished. A small file is written there and removed, to
    notice now, and not after hours, that this is not allowed.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        names = set()
    if names and names.isdisjoint((marker, UNFINISHED)):
        raise UserError(f"{folder} exists and was not written by this command; choose another --out")
    if marker in names and not force:
        raise UserError(f"{folder} exists; --force replaces it when the new one is complete")
    check_remote_writable(folder)


def check_remote_writable(folder: RemotePath) -> None:
    """Raises UserError when no file can be written in `folder`, by writing one, which is removed if it is new."""
    is_new = not (folder / UNFINISHED).exists()
    _write_unfinished(folder)
    if is_new:
        (folder / UNFINISHED).unlink()


@contextmanager
def whole_remote_folder(folder: RemotePath, marker: str) -> Iterator[Path]:
    """A new local folder for files, which replaces the remote `folder` when the block ends.

    Nothing locks a remote folder. Raises UserError when files of it are seen to change while they are written.
    """
    with tempfile.TemporaryDirectory(prefix="gpt_jax-") as local:
        yield Path(local)
        upload(Path(local), folder, marker)


def upload(local: Path, folder: RemotePath, marker: str) -> None:
    """Replaces the files of a remote folder by those of a local one, which has no folders in it.

    The marker is removed first and written last, so a reader sees no folder, or a whole one. Raises UserError.
    """
    _write_unfinished(folder)
    remove(folder, marker)
    written: dict[RemotePath, str] = {}
    try:
        for file in sorted(local.iterdir(), key=lambda file: file.name == marker):
            path = folder / file.name
            if file.name == marker and any(other.version() != version for other, version in written.items()):
                raise UserError(f"another process is writing {folder}; wait for it, and start again")
            path.upload(file)
            if path.stat().st_size != file.stat().st_size:
                raise UserError(f"{path} has not the size that was written; another process may be writing {folder}")
            written[path] = path.version()
    except FileNotFoundError as e:  # Removed by another process, or there is no bucket.
        raise UserError(f"{folder} could not be written ({e.strerror}: {e.filename}); it is not whole now") from e
    (folder / UNFINISHED).unlink()


def remove(folder: RemotePath, marker: str) -> None:
    """Removes the files of a remote folder, its marker first, and keeps UNFINISHED."""
    (folder / marker).unlink()
    for path in folder.files():
        if path.name != UNFINISHED:
            path.unlink()


@contextmanager
def local_copy(folder: AnyPath, without: tuple[str, ...]) -> Iterator[Path]:
    """A local folder, itself; of a remote one, a copy of the files whose suffix is none of `without`, for the block.
    Errors that users see name the remote one."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gpt_jax-") as local:
        for path in folder.iterdir():
            if path.suffix not in without and path.is_file():
                Path(local, path.name).write_bytes(path.read_bytes())
        with named(folder, Path(local)):
            yield Path(local)


@contextmanager
def named(folder: RemotePath, local: Path) -> Iterator[None]:
    """Lets errors that users see name the remote folder where they name its local copy."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace(str(local), str(folder))) from e


class Mirror:
    """A local folder, first a copy of the files directly in a remote one, to which what changes here is uploaded."""

    def __init__(self, folder: RemotePath) -> None:
        self.folder, self.local = folder, Path(tempfile.mkdtemp(prefix="gpt_jax-"))
        weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)
        self._uploaded: dict[Path, tuple[int, int]] = {}  # Size and time of change of the local files.
        self._versions: dict[Path, str] = {}  # Of the remote files.
        for path in folder.iterdir() if folder.is_dir() else []:
            if path.is_file():
                file = self.local / path.name
                self._versions[file] = path.version()  # Before it is read, so that a later change is noticed.
                file.write_bytes(path.read_bytes())
                self._uploaded[file] = _state(file)

    def upload(self, last: str) -> None:
        """Uploads the files that were changed since the last time, that with the name `last` after all others.

        Nothing locks a remote folder. Raises UserError when a file there is not what was read or uploaded before.
        """
        files = (file for file in self.local.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: (file.name == last, file)):
            if self._uploaded.get(file) == (state := _state(file)):
                continue
            path = RemotePath(f"{self.folder}/{file.relative_to(self.local).as_posix()}")
            if self._versions.get(file, "") != (path.version() if path.exists() else ""):
                raise UserError(f"{path} was changed by another process; only one may write {self.folder} at a time")
            path.upload(file)
            self._uploaded[file], self._versions[file] = state, path.version()


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def move(folder: AnyPath, target: AnyPath) -> None:
    """Moves a folder to a place where there is none. The files of a remote one are copied, and then removed."""
    if isinstance(folder, Path):
        Path(str(target)).parent.mkdir(exist_ok=True)
        folder.rename(str(target))
        return
    files = folder.files()
    for file in files:
        copy = f"{target}{file.url.removeprefix(folder.url)}"
        file.request("copied", lambda fs, name: fs.cp_file(name, copy))  # noqa: B023
    for file in files:
        file.unlink()


def _write_unfinished(folder: RemotePath) -> None:
    with tempfile.NamedTemporaryFile() as empty:
        try:
            (folder / UNFINISHED).upload(Path(empty.name))
        except FileNotFoundError as e:
            raise UserError(f"{folder} could not be written: there is no such bucket or repository") from e
