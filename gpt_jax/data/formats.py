"""Text files in blocks: pieces of documents, so that memory does not grow with the size of a file or a document.

Text is UTF-8 and passed on byte for byte, except for a byte order mark at the start of a file. Invalid UTF-8 is an
error and never replaced, so that no wrongly converted corpus trains a model unnoticed. For the same reason, the content
of a file decides how it is unpacked and read, and its name only where the content leaves it open.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.data.records import (
    OnBroken,
    Record,
    fail,
    import_parquet,
    json_lines,
    json_values,
    no_object,
    parquet_columns,
    parquet_rows,
)
from gpt_jax.data.unpack import PACKED, damage_named, packing, unpacked
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath
from gpt_jax.system import command_line

BLOCK_BYTES = 1 << 20  # Largest block.
MAX_LINE_BYTES = 64 << 20  # Longest line of JSON Lines, or record of JSON, which must be parsed as a whole.
BINARY_CHECK_BYTES = 8192  # A NUL among the first bytes makes a file binary, as for git and grep.
MAX_NAMES = 20  # Most fields that an error lists.

RECORD_SUFFIXES = (".jsonl", ".ndjson")
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(\{\s*"|\[\s*["{])')

RECORDS = ("lines", "values", "parquet")  # The kinds that hold records.
Kind = Literal["text", "lines", "values", "unlike", "parquet", "binary", "empty", "unreadable"]
"""What a file holds: a text, JSON Lines, records in a JSON array or one after the other, what is like JSON or a table
but not records with the field of the text (and is read as a text), Parquet, something else, nothing; or it cannot be
opened."""


class Block(NamedTuple):
    """A piece of a document."""

    text: bytes  # Valid UTF-8. The blocks of a document concatenate to it.
    ends_document: bool
    position: int  # Bytes of the source file read so far, before unpacking.


def read_blocks(path: AnyPath, text_field: str) -> Iterator[Block]:
    """The documents of a file, one after the other, in blocks of at most BLOCK_BYTES.

    Records (see `kind_of`) are a document each, the text in their field `text_field`, which may be nested, as in
    meta.text. Any other file is one document. Records whose text is empty or null are no documents. Raises UserError
    naming the file, and the byte, line or row, that cannot be read.
    """
    with _opened(path) as raw:
        kind = _kind(path, raw, text_field)
        if kind in RECORDS:
            if kind == "parquet" and _field(columns := parquet_columns(path), text_field) is MISSING:
                raise UserError(f"{path} has no column {text_field!r}; {_choose_field(columns)}")
            for record in _records(path, raw, kind, [text_field], fail):
                yield from record_blocks(record, text_field)
        elif kind == "empty":
            raise UserError(f"{path} is empty")
        elif kind == "binary":
            head = unpacked(path, raw).read(BINARY_CHECK_BYTES)
            raise UserError(f"{path} is a binary file, not text{_advice(path, head)}")
        else:
            yield from _read_text(path, unpacked(path, raw), raw.tell)


def read_records(path: AnyPath, columns: Sequence[str] | None = None, on_broken: OnBroken = fail) -> Iterator[Record]:
    """The records of a file: of JSON Lines, a JSON array, JSON objects one after the other, or Parquet, also packed.

    columns: those that are read from Parquet, as far as they are there; None: all. on_broken: see `records`; it is told
    of lines of JSON Lines that are no JSON, and of values that are no objects. Raises UserError naming the file, and
    the line or row, that cannot be read, and for a file of another kind.
    """
    with _opened(path) as raw:
        kind = _kind(path, raw, None)
        if kind == "empty":
            raise UserError(f"{path} is empty")
        if kind not in RECORDS:
            raise UserError(f"{path} holds no records; JSON Lines, a JSON array of objects, and Parquet do")
        yield from _records(path, raw, kind, columns, on_broken)


def _records(
    path: AnyPath, raw: io.BufferedReader, kind: Kind, columns: Sequence[str] | None, on_broken: OnBroken
) -> Iterator[Record]:
    """See read_records."""
    wanted = f" with a field {columns[0]!r}" if columns else ""
    if kind == "parquet":
        yield from parquet_rows(path, columns)
    elif kind == "lines":
        yield from json_lines(path, unpacked(path, raw), raw.tell, MAX_LINE_BYTES, on_broken, wanted)
    else:
        for number, value in enumerate(json_values(path, unpacked(path, raw), MAX_LINE_BYTES), 1):
            where = f"{path}, record {number}"
            if isinstance(value, dict):
                yield Record(value, where, raw.tell())
            else:
                on_broken(no_object(where, wanted))


@contextmanager
def _opened(path: AnyPath) -> Iterator[io.BufferedReader]:
    """The file, open; what goes wrong while it is read becomes a UserError."""
    try:
        with damage_named(path), path.open("rb") as raw:
            yield raw
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from e


def kind_of(path: AnyPath, text_field: str | None) -> Kind:
    """What a file holds, judged by its beginning, after unpacking.

    `.jsonl` and `.ndjson` hold records. Any other file does if it begins with two lines of JSON objects, with a list of
    objects, or with an object that has the field `text_field` and is not followed by something else. A single object
    without that field may as well be a program's file, and is one document. So is everything but Parquet when
    `text_field` is empty; when it is None, any object is a record.

    Raises UserError when the file is damaged, is a table with a column `text_field`, or needs a package that is not
    installed.
    """
    try:
        with damage_named(path), path.open("rb") as raw:
            return _kind(path, raw, text_field)
    except OSError:
        return "unreadable"


def _kind(path: AnyPath, raw: io.BufferedReader, text_field: str | None) -> Kind:
    """See kind_of. `raw` is left at its beginning. text_field None: any object is a record."""
    file = unpacked(path, raw)
    head = file.read(BINARY_CHECK_BYTES)
    raw.seek(0)
    name = Path(path.name.lower())
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    if file is raw and (suffix == ".parquet" or head.startswith(b"PAR1")):
        import_parquet(path)
        return "parquet"
    if head in (b"", codecs.BOM_UTF8):
        return "empty"
    if b"\0" in head or head.startswith(b"%PDF-") or packing(head):
        return "binary"
    if text_field == "":
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


def _json_kind(path: AnyPath, raw: io.BufferedReader, text_field: str | None, named_so: bool) -> Kind:
    """The kind of a file that begins like JSON. `raw` is left at its beginning. named_so: its name says JSON Lines."""

    def is_record(value: object) -> bool:
        return isinstance(value, dict) and (text_field is None or _field(value, text_field) is not MISSING)

    file, lines = unpacked(path, raw), list[bytes]()
    while len(lines) < 2 and (line := file.readline(MAX_LINE_BYTES)):
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        lines += [line] if line else []
    raw.seek(0)
    rows = [_parsed(line) for line in lines]
    is_list = lines[0].startswith(b"[")
    if named_so and not is_list:
        return "lines"
    if any(isinstance(row, dict) for row in rows) and all(line.startswith(b"{") for line in lines):
        return "lines" if len(lines) == 2 or is_record(rows[0]) else "unlike"
    if text_field is None:
        return "values"
    values, first, second = json_values(path, unpacked(path, raw), MAX_LINE_BYTES), None, None
    with suppress(UserError):
        first = next(values, None)
        second = next(values, None)
    raw.seek(0)
    if is_list:
        return "values" if isinstance(first, dict) else "unlike"
    return "values" if is_record(first) and not isinstance(second, str) else "unlike"


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


def _read_text(path: AnyPath, file: io.BufferedIOBase, tell: Callable[[], int]) -> Iterator[Block]:
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


def _advice(path: AnyPath, head: bytes) -> str:
    """What to do with a binary file, where that is known."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xff\xfe", b"\xfe\xff")):
        bits = 32 if head.startswith((b"\xff\xfe\0\0", b"\0\0")) else 16
        return f"; it looks like UTF-{bits}: iconv -f utf-{bits} -t utf-8 {path.name} > converted.txt"
    if packing(head):
        return "; it is packed twice: unpack it once"
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        return "; it is an archive: unpack it, and name the folder"
    if head.startswith(b"PAR1"):
        return "; it is packed Parquet: unpack it"
    return "; it is a PDF: pdftotext extracts the text" if head.startswith(b"%PDF-") else ""


MISSING = object()


def _field(record: dict[str, Any], name: str) -> Any:
    """The value of a record's field, which may be nested, as in meta.text; None if what it is nested in is null;
    MISSING if there is no such field."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if value is not None:
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def record_blocks(record: Record, text_field: str) -> Iterator[Block]:
    """The blocks of a record's text. Raises UserError when it has none in `text_field`; see read_blocks."""
    value, where, position = record
    text = _field(value, text_field)
    if text is MISSING:
        raise UserError(f"{where} has no field {text_field!r}; {_choose_field(value)}; '' reads files as they are")
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
