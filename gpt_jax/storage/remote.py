"""Files at addresses such as s3://bucket/folder, read and written through fsspec, with the names that pathlib has.

Every request is tried again after a failure that may pass: fsspec's backends do so for some failures and not for
others. Any other failure, and the last of several, ends in one line with the address, the operation and the cause.
"""

import difflib
import errno
import io
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from gpt_jax.errors import UserError

BLOCK_BYTES = 4 << 20
"""Bytes of a request. A request takes about 30 ms to begin, and then the time of 2 MiB or so, on common networks."""

ATTEMPTS = 7
FIRST_WAIT = 0.5
"""Seconds between the first two attempts, at most; twice as long before each further one, so half a minute in all."""

GIVE_UP_SECONDS = 60.0
"""After which nothing is tried again: some backends, such as gcsfs, try for most of a minute before they fail."""

T = TypeVar("T")


class Scheme(NamedTuple):
    """What a kind of address needs beside fsspec."""

    extra: str  # Of this package, which installs the backend.
    credentials: str  # How to give them.


SCHEMES = {
    "s3": Scheme("s3", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure"),
    "gs": Scheme("gcs", "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"),
    "hf": Scheme("interop", "run hf auth login, or set HF_TOKEN"),
}

PASSING_STATUS = {408, 429, 500, 502, 503, 504}  # HTTP: timeouts, too many requests, errors of the server.
LASTING_ERRNO = {
    *(errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),
    *(errno.EEXIST, errno.ENOSPC, errno.EROFS),
}
PASSING_NAMES = {
    *("HTTPClientError", "ConnectionError", "ResponseParserError"),  # botocore
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    "TransportError",  # httpx, google.auth
}
"""Classes of errors that are no OSErrors, by name, since their packages may not be installed."""

LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "httpx", "google", "gcsfs", "s3fs", "huggingface_hub"}
"""Packages whose own classes of errors say something about a request. Any other error is a bug."""


def is_remote(name: str) -> bool:
    """True for an address such as s3://bucket/folder; False for the name of a local file, also as file://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None and not name.startswith("file://")


def location(name: str | Path) -> "AnyPath":
    """The remote or local path that a user names. Raises UserError for an address without a bucket or a slash."""
    if isinstance(name, Path) or not is_remote(name):
        scheme, colon, rest = str(name).partition(":")
        if colon and scheme in SCHEMES:
            raise UserError(f"{name} is no address; did you mean {scheme}://{rest.lstrip('/')}?")
        return Path(str(name).removeprefix("file://"))
    if not name.partition("://")[2].strip("/"):
        raise UserError(f"{name} is no whole address; name it like s3://bucket/folder")
    return RemotePath(name.rstrip("/"))


class Stat(NamedTuple):
    """The part of `os.stat_result` that is known of a remote file."""

    st_size: int  # Bytes.


@dataclass(frozen=True)
class RemotePath:
    """A remote file or folder. Its methods do what those of `pathlib.Path` with their names do.

    They raise FileNotFoundError where there is no such file, bucket or repository, and UserError for all else: at once
    without credentials, permission or the backend's package, and after ATTEMPTS of a request that fails.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: "RemotePath") -> bool:
        return self.url.split("/") < other.url.split("/")  # The order of local paths, in which a/b comes before a-b.

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        """Such as s3."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder; of a bucket, the bucket itself."""
        folder = self.url.rpartition("/")[0]
        return self if folder.endswith(":/") else RemotePath(folder)

    def stat(self) -> Stat:
        return Stat(int(self.request("read", lambda fs, name: fs.info(name))["size"]))

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def exists(self) -> bool:
        return bool(self._type())

    def _type(self) -> str:
        try:
            return str(self.request("read", lambda fs, name: fs.info(name))["type"])
        except FileNotFoundError:
            return ""

    def version(self) -> str:
        """A hash of what the backend says of a file, such as its ETag, which changes with its content."""
        return str(self.request("read", lambda fs, name: fs.ukey(name)))

    def read_bytes(self) -> bytes:
        return bytes(self.request("read", lambda fs, name: fs.cat_file(name)))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end - 1`, which must be in the file."""

        def read(fs: Any, name: str) -> bytes:
            content = bytes(fs.cat_file(name, start=start, end=end))
            if len(content) != end - start:
                raise ConnectionError(f"{len(content)} bytes came instead of {end - start}")
            return content

        return self.request("read", read) if end > start else b""

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file, to be read in requests of BLOCK_BYTES."""
        assert mode == "rb", mode
        return io.BufferedReader(_Requests(self, self.stat().st_size), BLOCK_BYTES)

    def upload(self, file: Path) -> None:
        """Writes the content of a local file here."""
        self.request("written", lambda fs, name: fs.put_file(str(file), name))

    def unlink(self) -> None:
        """Removes a file, which may be gone."""
        with suppress(FileNotFoundError):
            self.request("removed", lambda fs, name: fs.rm_file(name))

    def iterdir(self) -> Iterator["RemotePath"]:
        """The entries of a folder, in sorted order."""
        entries = map(self._sibling, self.request("listed", lambda fs, name: fs.ls(name, detail=False)))
        return iter(sorted(entry for entry in entries if entry != self))

    def sibling_like(self) -> "RemotePath | None":
        """The entry beside this path, which is not there, whose name is most like its own. None when there is none."""
        try:
            names = [entry.name for entry in self.parent.iterdir()]
        except FileNotFoundError:
            return None
        return next((self.parent / name for name in difflib.get_close_matches(self.name, names, n=1)), None)

    def files(self) -> list["RemotePath"]:
        """All files below a folder, in sorted order."""
        names = self.request("listed", lambda fs, name: fs.find(name))
        return sorted(self._sibling(name) for name in names if not name.endswith("/"))  # S3 lists folders so.

    def glob(self) -> list["RemotePath"]:
        """All files whose addresses match this one, which is a pattern, in the order of their addresses."""
        found = self.request("listed", lambda fs, name: fs.glob(name, detail=True))
        return sorted((self._sibling(name) for name, info in found.items() if info["type"] == "file"), key=str)

    def _sibling(self, name: str) -> "RemotePath":
        """The path at a name of the backend, which leaves out the scheme, except for HTTP."""
        return RemotePath((name if "://" in name else f"{self.scheme}://{name.lstrip('/')}").rstrip("/"))

    def request(self, operation: str, call: Callable[[Any, str], T]) -> T:
        """The result of `call` with fsspec's file system and the file's name there. operation: a participle."""
        begin = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call(*self._backend())
            except FileNotFoundError as e:
                raise FileNotFoundError(errno.ENOENT, "there is no such file, bucket or repository", self.url) from e
            except Exception as e:
                if not _may_pass(e) or attempt == ATTEMPTS or time.monotonic() - begin > GIVE_UP_SECONDS:
                    raise self._named(e, operation, attempt) from e
                print(f"{self} could not be {operation} ({_cause(e)}); trying again", file=sys.stderr)
            # Waits of different lengths, so that many readers do not come back at the same time.
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        raise AssertionError

    def _backend(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # It takes 60 ms, which local files need not wait for.

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs each of its attempts with a traceback.
        # Listings are not kept, since others write there, too.
        return url_to_fs(self.url, use_listings_cache=False)

    def _named(self, e: Exception, operation: str, attempts: int) -> Exception:
        """The error for the user; `e` itself where it is a bug."""
        what, cause, scheme = f"{self} could not be {operation}", _cause(e), SCHEMES.get(self.scheme)
        if isinstance(e, ImportError):
            advice = f"pip install 'gpt-jax[{scheme.extra}]'" if scheme else "install it"
            return UserError(f"{what}: a package for {self.scheme}:// is missing ({cause}); {advice}")
        if isinstance(e, ValueError) and "Protocol not known" in cause:
            near = difflib.get_close_matches(self.scheme, SCHEMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}://?" if near else f"known are {', '.join(f'{s}://' for s in SCHEMES)}"
            return UserError(f"{what}: {self.scheme}:// is unknown; {hint}")
        if isinstance(e, PermissionError) or "Credential" in type(e).__name__:
            hint = f"; {scheme.credentials}" if scheme else ""
            return UserError(f"{what}: access was denied ({cause}){hint}")
        if _may_pass(e):
            tried = f"{attempts} attempt{'s' * (attempts > 1)}"
            return UserError(f"{what} in {tried} ({cause}); try again later")
        is_of_library = type(e).__module__.partition(".")[0] in LIBRARIES
        return UserError(f"{what} ({cause})") if isinstance(e, OSError) or is_of_library else e


AnyPath = Path | RemotePath


class _Requests(io.RawIOBase):
    """A remote file whose reads are requests, each of which can be repeated, since none depends on another."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        n = max(0, min(len(buffer), self._size - self._position))
        buffer[:n] = self._path.read_range(self._position, self._position + n)
        self._position += n
        return n


def _cause(e: Exception) -> str:
    """The message of a backend's error in one line."""
    return " ".join(str(e).split())[:200] or type(e).__name__


def _may_pass(e: Exception) -> bool:
    """True for an error after which the same request may succeed."""
    response = getattr(e, "response", None)
    status = getattr(response, "status_code", None) or getattr(e, "code", None) or getattr(e, "status", None)
    if isinstance(status, int):
        return status in PASSING_STATUS
    if isinstance(e, OSError) and not isinstance(e, PermissionError | FileExistsError):
        return e.errno not in LASTING_ERRNO
    return not {base.__name__ for base in type(e).__mro__}.isdisjoint(PASSING_NAMES)
