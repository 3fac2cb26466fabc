"""Arrays in remote files, read by blocks that a bounded local file keeps."""

import errno
import functools
import os
import shutil
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.storage.remote import BLOCK_BYTES, RemotePath
from gpt_jax.system import cache_folder


class BlockCache:
    """Blocks of bytes in a local file, of which those that were not used for longest make room for others.

    The file has no name, and so is gone when the process ends, however it ends. Threads may share a cache.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        """max_bytes: of the file, at least one block; block_bytes: of a block, at most."""
        self.block_bytes = block_bytes
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # It is open as long as the cache is there.
        self._lock = threading.Lock()  # Held to read and write the file, and never while a block is fetched.
        self._overflowed = False
        self._fetched: dict[Hashable, Future[bytes]] = {}  # While they are, so that threads fetch no block twice.
        # Places in the file, in blocks. The last of the free ones is used next, so the file is no larger than need be.
        self._free = list(reversed(range(max(1, max_bytes // block_bytes))))
        self._places: OrderedDict[Hashable, int] = OrderedDict()  # Of each block; the least recently used one first.

    def read(self, key: Hashable, part: slice, fetch: Callable[[], bytes]) -> bytes:
        """A part of the block `key`, which `fetch` gets when it is not here, in one of the threads that ask for it."""
        with self._lock:
            if key in self._places:
                self._places.move_to_end(key)
                offset = self._places[key] * self.block_bytes + part.start
                return os.pread(self._file.fileno(), part.stop - part.start, offset)
            is_first = key not in self._fetched
            fetched = self._fetched.setdefault(key, Future())
        if is_first:
            try:
                block = fetch()
                with self._lock:
                    self._places[key] = self._write(block)
                fetched.set_result(block)
            except BaseException as e:
                fetched.set_exception(e)
            finally:
                with self._lock:
                    del self._fetched[key]
        return fetched.result()[part]

    def _write(self, block: bytes) -> int:
        """The place of a block, written there."""
        if not self._free and not self._overflowed:
            self._overflowed = True
            print(
                f"{self._folder} has no room for all that is read from remote files, so parts are fetched again and "
                "again; set XDG_CACHE_HOME to a folder on a larger disk, or copy the data to one",
                file=sys.stderr,
            )
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        try:
            if os.pwrite(self._file.fileno(), block, place * self.block_bytes) < len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self._free.append(place)
            raise UserError(
                f"{self._folder} cannot keep what is read from remote files ({e.strerror}); make room, or set "
                "XDG_CACHE_HOME to a folder on a larger disk"
            ) from e
        return place


@functools.cache
def shared_cache() -> BlockCache:
    """The cache of this process, in the user's cache folder, of at most half of what is free on that disk.

    It should hold all of the data, since training reads windows in random order. Raises UserError when nothing can be
    written there.
    """
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return BlockCache(folder, shutil.disk_usage(folder).free // 2)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be written ({e.strerror}); set XDG_CACHE_HOME to another folder") from e


class RemoteArray:
    """A remote file as an array (count,), of which slices are read."""

    def __init__(self, path: RemotePath, dtype: np.dtype, count: int, cache: BlockCache | None = None) -> None:
        """count: items of the file, whose size the caller has checked. cache: None for the one of this process."""
        self._path, self._dtype, self._count = path, dtype, count
        self._cache = cache or shared_cache()
        self._version = path.version()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, items: slice) -> np.ndarray:
        """The items, in memory of their own. Raises UserError when they cannot be read, and when the file is another
        than it was at first."""
        start, stop, step = items.indices(self._count)
        assert step == 1, items
        position, end, size = start * self._dtype.itemsize, stop * self._dtype.itemsize, self._cache.block_bytes
        parts = []
        while position < end:
            block = position // size
            part = slice(position - block * size, min(end - block * size, size))
            parts.append(self._cache.read((self._path, self._version, block), part, lambda: self._fetch(block)))  # noqa: B023
            position = block * size + part.stop
        return np.frombuffer(b"".join(parts), self._dtype)

    def _fetch(self, block: int) -> bytes:
        start = block * self._cache.block_bytes
        end = min(start + self._cache.block_bytes, self._count * self._dtype.itemsize)
        content = self._path.read_range(start, end)
        if self._path.version() != self._version:  # Asked afterwards, so that what was read is of this version.
            raise UserError(f"{self._path} was replaced while it was read; start again")
        return content
