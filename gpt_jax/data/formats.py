"""Text files in blocks: pieces of documents, so that memory does not grow with the size of a file or a document.

Text is UTF-8 and passed on byte for byte, except for a byte order mark at the start of a file. Invalid UTF-8 is an
error and never replaced, so that no wrongly converted corpus trains a model unnoticed.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from gpt_jax.errors import UserError

BLOCK_BYTES = 1 << 20  # Largest block.
MAX_LINE_BYTES = 64 << 20  # Longest line of JSON Lines, which must be parsed as a whole.
BINARY_CHECK_BYTES = 8192  # A NUL among the first bytes makes a file binary, as for git and grep.


class Block(NamedTuple):
    """A piece of a document."""

    text: bytes  # Valid UTF-8. The blocks of a document concatenate to it.
    ends_document: bool
    position: int  # Bytes of the source file read so far, before unpacking.


def read_blocks(path: Path, text_field: str) -> Iterator[Block]:
    """The documents of a file, one after the other, in blocks of at most BLOCK_BYTES.

    `.jsonl` (`.ndjson`) and `.parquet` hold one document a row, in the field `text_field`; any other file is one
    document. Files ending in `.gz` or `.zst` are unpacked. Rows whose text is empty or null are no documents.
    Raises UserError naming the file, and the byte, line or row, that cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, text_field)
            return
        with path.open("rb") as raw, _unpacked(raw, path.suffix) as file:
            if _inner_suffix(path) in (".jsonl", ".ndjson"):
                yield from _read_json_lines(path, file, raw.tell, text_field)
            else:
                yield from _read_text(path, file, raw.tell)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as e:
        raise UserError(f"{path} is damaged or cut short ({e}); get it again") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from e


def has_text(path: Path) -> bool:
    """True when a file, unpacked if it is packed, is neither empty nor binary. Parquet counts as text."""
    if path.suffix == ".parquet":
        return True
    try:
        with path.open("rb") as raw, _unpacked(raw, path.suffix) as file:
            start = file.read(BINARY_CHECK_BYTES)
            return bool(start) and b"\0" not in start
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        return True  # Reading it will raise the error.


def cut_before_space(text: bytes, limit: int) -> int:
    """The largest n <= limit, n > 0, such that text[n:] starts with a space or a newline; len(text) if that is allowed.

    Without such an n, the cut is between two characters. Blocks are joined again before they are tokenised, and cut
    where the tokenizer allows; see `Tokenizer.cut`.
    """
    if limit >= len(text):
        return len(text)
    cut = max(text.rfind(b" ", 1, limit + 1), text.rfind(b"\n", 1, limit + 1))
    if cut < 0:
        # A character has at most four bytes; those after its first are 10xxxxxx.
        cut = next((n for n in range(limit, max(limit - 4, -1), -1) if text[n] & 0xC0 != 0x80), limit)
    return cut


def cut_document(text: bytes, position: int) -> Iterator[Block]:
    """The blocks of a whole document, which must not be empty."""
    start = 0
    while start < len(text):
        end = start + cut_before_space(text[start : start + BLOCK_BYTES + 1], BLOCK_BYTES)
        yield Block(text[start:end], end == len(text), position)
        start = end


def _read_text(path: Path, file: io.BufferedIOBase, tell: Callable[[], int]) -> Iterator[Block]:
    offset = 0  # Of `rest` in the unpacked file.
    rest = file.read(BLOCK_BYTES + 1)
    if b"\0" in rest[:BINARY_CHECK_BYTES]:
        advice = ""
        if rest.startswith((b"\xff\xfe", b"\xfe\xff")):
            advice = f"; it looks like UTF-16: iconv -f utf-16 -t utf-8 {path.name} > converted.txt"
        raise UserError(f"{path} is a binary file, not text{advice}")
    if rest.startswith(b"\xef\xbb\xbf"):
        offset, rest = 3, rest[3:]
    if not rest:
        raise UserError(f"{path} is empty")
    while rest:
        # One byte more than a block shows whether the block is the last.
        rest += file.read(BLOCK_BYTES + 1 - len(rest))
        text = rest[: cut_before_space(rest, BLOCK_BYTES)]
        try:
            text.decode()
        except UnicodeDecodeError as e:
            raise UserError(
                f"{path} is not UTF-8 text: byte {offset + e.start} is 0x{text[e.start]:02x}; convert it, for example "
                f"with iconv -f ENCODING -t utf-8 {path.name} > converted.txt"
            ) from None
        offset, rest = offset + len(text), rest[len(text) :]
        yield Block(text, not rest, tell())


def _read_json_lines(path: Path, file: io.BufferedIOBase, tell: Callable[[], int], text_field: str) -> Iterator[Block]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        where = f"{path}, line {number}"
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 text: byte {e.start} of the line is 0x{line[e.start]:02x}") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where} is not JSON ({e})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object with a field {text_field!r}")
        if text_field not in row:
            raise UserError(f"{where} has no field {text_field!r}; {_choose_field(list(row))}")
        yield from _row(row[text_field], where, text_field, tell())


def _read_parquet(path: Path, text_field: str) -> Iterator[Block]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'gpt-jax[parquet]'") from None
    size, number = path.stat().st_size, 0
    try:
        # Pages are read as their rows are needed, not whole row groups, which can be larger than the memory.
        with pq.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {text_field!r}; {_choose_field(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    position = size * number // file.metadata.num_rows
                    yield from _row(value.as_py(), f"{path}, row {number}", text_field, position)
    except pa.ArrowException as e:
        raise UserError(f"{path} cannot be read as Parquet ({str(e).splitlines()[0]})") from e


def _row(text: object, where: str, text_field: str, position: int) -> Iterator[Block]:
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_field!r} is not text but of type {type(text).__name__}")
    try:
        yield from cut_document(text.encode(), position)
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: character {e.start} of {text_field!r} is half of a surrogate pair") from None


def _choose_field(names: list[str]) -> str:
    return f"choose one of its fields with --text-field: {', '.join(names) or '(there are none)'}"


def _inner_suffix(path: Path) -> str:
    """The suffix of the format, which stands before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _unpacked(raw: io.BufferedIOBase, suffix: str) -> io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), BLOCK_BYTES)
    return raw


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
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._text = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n
