"""Packed files, read as what they hold: gzip, Zstandard, bzip2 and xz, whatever the names of the files."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zstandard

from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath

BUFFER_BYTES = 1 << 20  # Of unpacked Zstandard.
MAX_WINDOW = 1 << 31  # Bytes that unpacking Zstandard may look back, as with zstd --long=31.

PACKED = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # The second is a frame to be skipped.
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
"""The beginning of packed files, by the suffix that they should have."""


def packing(head: bytes) -> str | None:
    """The suffix that a file that begins like this should have; None when it is not packed."""
    return next((suffix for suffix, magic in PACKED.items() if magic.match(head)), None)


def unpacked(path: AnyPath, raw: io.BufferedReader) -> io.BufferedIOBase:
    """The content of a packed file, whatever its name, or the file itself. `raw` is at its beginning."""
    suffix = packing(raw.read(16)) or path.suffix.lower()
    raw.seek(0)
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), BUFFER_BYTES)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if suffix == ".xz" else raw


@contextmanager
def damage_named(path: AnyPath) -> Iterator[None]:
    """Makes a UserError of what reading a damaged file raises."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as e:
        advice = "unpack it first, with its dictionary: zstd -d -D" if "ictionary" in str(e) else "get it again"
        raise UserError(f"{path} is damaged or cut short ({e}); {advice}") from e


class _ZstdFile(io.RawIOBase):
    """Unpacks Zstandard frames one by one. The library's own reader accepts a truncated file as a whole one."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw = raw
        self._frame: Any = None
        self._packed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            # 4 KiB at a time, since input is unpacked at once, to up to 30,000 times its size.
            self._packed = self._packed or self._raw.read(4096)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            self._text = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n
