"""Text files in blocks: pieces of documents, so that memory does not grow with the size of a file or a document.

Text is UTF-8 and passed on byte for byte, except for a byte order mark at the start of a file. Invalid UTF-8 is an
error and never replaced, so that no wrongly converted corpus trains a model unnoticed. For the same reason, the content
of a file decides how it is unpacked and read, and its name only where the content leaves it open.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard

from gpt_jax.errors import UserError
from gpt_jax.system import command_line

BLOCK_BYTES = 1 << 20  # Largest block.
MAX_LINE_BYTES = 64 << 20  # Longest line of JSON Lines, or record of JSON, which must be parsed as a whole.
MAX_WINDOW = 1 << 31  # Bytes that unpacking Zstandard may look back, as with zstd --long=31.
BINARY_CHECK_BYTES = 8192  # A NUL among the first bytes makes a file binary, as for git and grep.
MAX_NAMES = 20  # Most fields that an error lists.

PACKED = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # The second is a frame to be skipped.
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
"""The beginning of packed files, by the suffix that they should have."""

RECORD_SUFFIXES = (".jsonl", ".ndjson")
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(\{\s*"|\[\s*["{])')
SPACE = re.compile(r"[ \t\r\n]*")

Kind = Literal["text", "lines", "values", "unlike", "parquet", "binary", "empty", "unreadable"]
"""What a file holds: a text, JSON Lines, records in a JSON array or one after the other, what is like JSON or a table
but not records with the field of the text (and is read as a text), Parquet, something else, nothing; or it cannot be
opened."""


class Block(NamedTuple):
    """A piece of a document."""

    text: bytes  # Valid UTF-8. The blocks of a document concatenate to it.
    ends_document: bool
    position: int  # Bytes of the source file read so far, before unpacking.


def read_blocks(path: Path, text_field: str) -> Iterator[Block]:
    """The documents of a file, one after the other, in blocks of at most BLOCK_BYTES.

    Records (see `kind_of`) are a document each, the text in their field `text_field`, which may be nested, as in
    meta.text. Any other file is one document. Records whose text is empty or null are no documents. Raises UserError
    naming the file, and the byte, line or row, that cannot be read.
    """
    try:
        with _damage_named(path), path.open("rb") as raw:
            kind = _kind(path, raw, text_field)
            file = _unpacked(path, raw)
            if kind == "parquet":
                yield from _read_parquet(path, text_field)
            elif kind == "lines":
                yield from _read_json_lines(path, file, raw.tell, text_field)
            elif kind == "values":
                for number, value in enumerate(_json_values(path, file), 1):
                    yield from _record(value, f"{path}, record {number}", text_field, raw.tell())
            elif kind == "empty":
                raise UserError(f"{path} is empty")
            elif kind == "binary":
                raise UserError(f"{path} is a binary file, not text{_advice(path, file.read(BINARY_CHECK_BYTES))}")
            else:
                yield from _read_text(path, file, raw.tell)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from e


def kind_of(path: Path, text_field: str) -> Kind:
    """What a file holds, judged by its beginning, after unpacking.

    `.jsonl` and `.ndjson` hold records. Any other file does if it begins with two lines of JSON objects, with a list of
    objects, or with an object that has the field `text_field` and is not followed by something else. A single object
    without that field may as well be a program's file, and is one document. So is everything but Parquet when
    `text_field` is empty.

    Raises UserError when the file is damaged, is a table with a column `text_field`, or needs a package that is not
    installed.
    """
    try:
        with _damage_named(path), path.open("rb") as raw:
            return _kind(path, raw, text_field)
    except OSError:
        return "unreadable"


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Makes a UserError of what reading a damaged file raises."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as e:
        advice = "unpack it first, with its dictionary: zstd -d -D" if "ictionary" in str(e) else "get it again"
        raise UserError(f"{path} is damaged or cut short ({e}); {advice}") from e


def _kind(path: Path, raw: io.BufferedReader, text_field: str) -> Kind:
    """See kind_of. `raw` is left at its beginning."""
    file = _unpacked(path, raw)
    head = file.read(BINARY_CHECK_BYTES)
    raw.seek(0)
    name = Path(path.name.lower())
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    if file is raw and (suffix == ".parquet" or head.startswith(b"PAR1")):
        _import_parquet(path)
        return "parquet"
    if head in (b"", codecs.BOM_UTF8):
        return "empty"
    if b"\0" in head or head.startswith(b"%PDF-") or _packing(head):
        return "binary"
    if not text_field:
        return "text"
    kind: Kind = "text"
    if JSON_START.match(head):
        kind = _json_kind(path, raw, text_field, suffix in RECORD_SUFFIXES)
    elif suffix in (".csv", ".tsv"):
        kind = "unlike"
        row = head.decode("utf-8-sig", errors="replace").splitlines()[0]
        if text_field in next(csv.reader([row], delimiter="\t" if suffix == ".tsv" else ",")):
            raise UserError(
                f"{path} is a table with a column {text_field!r}; convert it to JSON Lines or Parquet, for example by "
                f"pandas.read_csv({path.name!r}).to_json({path.stem + '.jsonl'!r}, orient='records', lines=True)"
            )
    return "lines" if suffix in RECORD_SUFFIXES and kind != "values" else kind


def _json_kind(path: Path, raw: io.BufferedReader, text_field: str, named_so: bool) -> Kind:
    """The kind of a file that begins like JSON. `raw` is left at its beginning. named_so: its name says JSON Lines."""
    file, lines = _unpacked(path, raw), list[bytes]()
    while len(lines) < 2 and (line := file.readline(MAX_LINE_BYTES)):
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        lines += [line] if line else []
    raw.seek(0)
    rows = [_parsed(line) for line in lines]
    is_list = lines[0].startswith(b"[")
    if named_so and not is_list:
        return "lines"
    if any(isinstance(row, dict) for row in rows) and all(line.startswith(b"{") for line in lines):
        return "lines" if len(lines) == 2 or _field(rows[0], text_field) is not MISSING else "unlike"
    values, first, second = _json_values(path, _unpacked(path, raw)), None, None
    with suppress(UserError):
        first = next(values, None)
        second = next(values, None)
    raw.seek(0)
    if is_list:
        return "values" if isinstance(first, dict) else "unlike"
    return "values" if _field(first, text_field) is not MISSING and not isinstance(second, str) else "unlike"


def _parsed(line: bytes) -> object:
    """The value of a line of JSON; None for what is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


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
    if rest.startswith(codecs.BOM_UTF8):
        offset, rest = 3, rest[3:]
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


def _advice(path: Path, head: bytes) -> str:
    """What to do with a binary file, where that is known."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xff\xfe", b"\xfe\xff")):
        bits = 32 if head.startswith((b"\xff\xfe\0\0", b"\0\0")) else 16
        return f"; it looks like UTF-{bits}: iconv -f utf-{bits} -t utf-8 {path.name} > converted.txt"
    if _packing(head):
        return "; it is packed twice: unpack it once"
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        return "; it is an archive: unpack it, and name the folder"
    if head.startswith(b"PAR1"):
        return "; it is packed Parquet: unpack it"
    return "; it is a PDF: pdftotext extracts the text" if head.startswith(b"%PDF-") else ""


def _read_json_lines(path: Path, file: io.BufferedIOBase, tell: Callable[[], int], text_field: str) -> Iterator[Block]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        where = f"{path}, line {number}"
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB")
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 text: byte {e.start} of the line is 0x{line[e.start]:02x}") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where} is not JSON ({e})") from None
        yield from _record(row, where, text_field, tell())


def _json_values(path: Path, file: io.BufferedIOBase) -> Iterator[object]:
    """The elements of a JSON array, or the JSON objects that follow each other in a file, parsed one by one. A text
    that follows an object is given as its first character, and ends the values."""
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")().decode
    text, position, number, expected = "", 0, 1, "any"

    def read_on() -> bool:
        """Reads as much as is waiting, so that a long value is not parsed many times. False at the end of the file."""
        nonlocal text, position
        chunk = file.read(max(BLOCK_BYTES, len(text) - position))
        try:
            text, position = text[position:] + decode(chunk, not chunk), 0
        except UnicodeDecodeError as e:
            raise UserError(f"{path}, record {number} or after is not UTF-8 text ({e.reason})") from None
        return bool(chunk)

    while True:
        position = SPACE.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            if read_on():
                continue
            break
        character = text[position]
        if expected == "any" and character == "[":
            expected, position = "first", position + 1
        elif expected in ("first", "comma") and character == "]":
            expected, position = "end", position + 1
        elif expected == "comma" and character == ",":
            expected, position = "element", position + 1
        elif expected == "value" and character not in "{,]}":
            yield character
            return
        elif expected in ("comma", "end"):
            raise UserError(f"{path}, record {number} is not JSON: {character!r} follows the one before")
        else:
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as e:
                if isinstance(e, ValueError) and len(text) - position < MAX_LINE_BYTES and read_on():
                    continue
                raise UserError(f"{path}, record {number} is not JSON ({getattr(e, 'msg', e)})") from None
            yield value
            number += 1
            expected = "comma" if expected in ("first", "element") else "value"
    if expected in ("first", "element", "comma"):
        raise UserError(f"{path} is cut short: its list of records does not end; get it again")


def _import_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'gpt-jax[parquet]'") from None
    return pyarrow


def _read_parquet(path: Path, text_field: str) -> Iterator[Block]:
    pa = _import_parquet(path)
    size, number = path.stat().st_size, 0
    try:
        # Pages are read as their rows are needed, not whole row groups, which can be larger than the memory.
        with pa.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            columns = {column.name: _children(column.type) for column in file.schema_arrow}
            if _field(columns, text_field) is MISSING:
                raise UserError(f"{path} has no column {text_field!r}; {_choose_field(columns)}")
            name = text_field if text_field in columns else text_field.partition(".")[0]
            for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
                for value in batch.column(batch.schema.names.index(name)):
                    number += 1
                    position = size * number // file.metadata.num_rows
                    yield from _record({name: value.as_py()}, f"{path}, row {number}", text_field, position)
    except pa.ArrowException as e:
        raise UserError(f"{path} cannot be read as Parquet ({str(e).splitlines()[0]})") from e


def _children(column_type: Any) -> dict[str, Any]:
    """The nested fields of a column of Parquet, by their names; empty for a plain one."""
    is_struct = str(column_type).startswith("struct<")
    return {field.name: _children(field.type) for field in column_type} if is_struct else {}


MISSING = object()


def _field(record: object, name: str) -> Any:
    """The value of a record's field, which may be nested, as in meta.text; None if what it is nested in is null;
    MISSING if there is no such field."""
    value = record if isinstance(record, dict) else MISSING
    for part in [name] if isinstance(record, dict) and name in record else name.split("."):
        if value is not None:
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def _record(record: object, where: str, text_field: str, position: int) -> Iterator[Block]:
    """The blocks of a record's text."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object with a field {text_field!r}")
    text = _field(record, text_field)
    if text is MISSING:
        raise UserError(f"{where} has no field {text_field!r}; {_choose_field(record)}; '' reads files as they are")
    if text is None:
        return
    try:
        if not isinstance(text, str | bytes):
            raise UserError(f"{where}: {text_field!r} is not text but of type {type(text).__name__}")
        encoded = text.encode() if isinstance(text, str) else text.decode().encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: character {e.start} of {text_field!r} is half of a surrogate pair") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: byte {e.start} of {text_field!r} is 0x{e.object[e.start]:02x}: no UTF-8") from None
    yield from cut_document(encoded, position)


def _choose_field(record: dict[str, Any]) -> str:
    nested = {name: value if isinstance(value, dict) else {} for name, value in record.items()}
    names = [name for key, value in nested.items() for name in (key, *(f"{key}.{inner}" for inner in value))]
    listed = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    # `train` reads text, too, and has no such flag.
    command = command_line("prepare", "SOURCE", "--out", "DIR", "--text-field", "FIELD")
    return f"choose one of its fields with: {command}; they are: {listed or '(there are none)'}"


def _packing(head: bytes) -> str | None:
    """The suffix that a file that begins like this should have; None when it is not packed."""
    return next((suffix for suffix, magic in PACKED.items() if magic.match(head)), None)


def _unpacked(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    """The content of a packed file, whatever its name, or the file itself. `raw` is at its beginning."""
    packing = _packing(raw.read(16)) or path.suffix.lower()
    raw.seek(0)
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".zst":
        return io.BufferedReader(_ZstdFile(raw), BLOCK_BYTES)
    if packing == ".bz2":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if packing == ".xz" else raw


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
