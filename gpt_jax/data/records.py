"""Records of JSON Lines, JSON and Parquet one by one, each with the place where it stands, and what is wrong with one.

A broken record ends reading with one line that names its place, unless the caller passes a function that is told of it
instead, such as a `Skipped`, which counts. What leaves open where the next record begins, such as a list of records
that is no JSON, or a damaged file, always ends reading.
"""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath

CHUNK_BYTES = 1 << 20  # Read at one time.
MAX_EXAMPLES = 3  # Most errors of one reason that are told in full.
SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """The fields of one record."""

    value: dict[str, Any]
    where: str  # Such as "FILE, line 3".
    position: int  # Bytes of the source file read so far, before unpacking.


class RecordError(UserError):
    """What is wrong with one record. The message is for people, and `reason` is a short text for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


OnBroken = Callable[[RecordError], object]
"""What is called with the error of a broken record: it raises, or the record is passed over."""


def fail(error: RecordError) -> None:
    """The OnBroken that raises the error."""
    raise error from None


class Skipped:
    """The OnBroken that counts the records that are passed over, by reason, and keeps the first errors of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __call__(self, error: RecordError) -> None:
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= MAX_EXAMPLES:
            self.examples.setdefault(error.reason, []).append(str(error))

    def packed(self) -> tuple[dict[str, int], dict[str, list[str]]]:
        """What JSON can hold of it, for `merge`."""
        return dict(self.counts), self.examples

    def merge(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        """Adds the counts and examples of records that come after those in here."""
        for reason, count in counts.items():
            self.counts[reason] += count
            kept = self.examples.setdefault(reason, [])
            kept += examples[reason][: MAX_EXAMPLES - len(kept)]

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        return [
            f"passed over {count:,} record{'s' * (count > 1)} ({reason}): {'; '.join(self.examples[reason])}"
            for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        ]


def no_object(where: str, wanted: str) -> RecordError:
    """The error of a value that is no object. wanted: see json_lines."""
    return RecordError("no JSON object", f"{where} is not a JSON object{wanted}")


def json_lines(
    path: AnyPath,
    file: io.BufferedIOBase,
    tell: Callable[[], int],
    max_line_bytes: int,
    on_broken: OnBroken,
    wanted: str,
) -> Iterator[Record]:
    """The objects of JSON Lines.

    tell: gives the position in the source. Broken are lines of max_line_bytes or more, and those that are no UTF-8, no
    JSON or no object. wanted: what an object should have, for the error; may be empty.
    """
    number, name = 0, str(path)
    while line := file.readline(max_line_bytes):
        number += 1
        where = f"{name}, line {number}"
        if len(line) == max_line_bytes:
            on_broken(RecordError("too long a line", f"{where} is longer than {max_line_bytes >> 20} MiB"))
            while line and not line.endswith(b"\n"):
                line = file.readline(max_line_bytes)
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as e:
            byte = f"byte {e.start} of the line is 0x{line[e.start]:02x}"
            on_broken(RecordError("no UTF-8", f"{where} is not UTF-8 text: {byte}"))
        except (ValueError, RecursionError) as e:
            on_broken(RecordError("no JSON", f"{where} is not JSON ({e})"))
        else:
            if isinstance(row, dict):
                yield Record(row, where, tell())
            else:
                on_broken(no_object(where, wanted))


def json_values(path: AnyPath, file: io.BufferedIOBase, max_record_bytes: int) -> Iterator[Any]:
    """The elements of a JSON array, or the JSON objects that follow each other in a file, parsed one by one. A text
    that follows an object is given as its first character, and cannot be read on.

    Raises UserError for what is no UTF-8 or no JSON, and for a record of max_record_bytes or more that does not end.
    """
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")().decode
    text, position, number, expected = "", 0, 1, "any"

    def read_on() -> bool:
        """Reads as much as is waiting, so that a long value is not parsed many times. False at the end of the file."""
        nonlocal text, position
        chunk = file.read(max(min(CHUNK_BYTES, max_record_bytes), len(text) - position))
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
            expected = "end"
        elif expected in ("comma", "end"):
            raise UserError(f"{path}, record {number} is not JSON: {character!r} follows the one before")
        else:
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as e:
                if isinstance(e, ValueError) and len(text) - position < max_record_bytes and read_on():
                    continue
                raise UserError(f"{path}, record {number} is not JSON ({getattr(e, 'msg', e)})") from None
            yield value
            number += 1
            expected = "comma" if expected in ("first", "element") else "value"
    if expected in ("first", "element", "comma"):
        raise UserError(f"{path} is cut short: its list of records does not end; get it again")


def import_parquet(path: AnyPath) -> Any:
    """pyarrow with its module `parquet`. Raises UserError when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'gpt-jax[parquet]'") from None
    return pyarrow


@contextmanager
def _open_parquet(path: AnyPath) -> Iterator[Any]:
    pa = import_parquet(path)
    try:
        # Pages are read as their rows are needed, not whole row groups, which can be larger than the memory.
        source = path if isinstance(path, Path) else path.open()
        with pa.parquet.ParquetFile(source, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            yield file
    except pa.ArrowException as e:
        raise UserError(f"{path} cannot be read as Parquet ({str(e).splitlines()[0]})") from e


def parquet_columns(path: AnyPath) -> dict[str, Any]:
    """The columns of a Parquet file by their names, each with its nested fields likewise; empty for a plain one.

    Raises UserError when the file is damaged.
    """

    def children(column_type: Any) -> dict[str, Any]:
        is_struct = str(column_type).startswith("struct<")
        return {field.name: children(field.type) for field in column_type} if is_struct else {}

    with _open_parquet(path) as file:
        return {column.name: children(column.type) for column in file.schema_arrow}


def parquet_rows(path: AnyPath, columns: Sequence[str] | None) -> Iterator[Record]:
    """The rows of a Parquet file, with those of `columns` that it has; None: with all. Nested ones are named a.b.

    Raises UserError when the file is damaged.
    """
    size, number = path.stat().st_size, 0
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=64, columns=columns, use_threads=False):
            names = batch.schema.names  # Of columns with one name the first counts, as for pandas and datasets.
            for value in batch.select([names.index(name) for name in names]).to_pylist():
                number += 1
                yield Record(value, f"{path}, row {number}", size * number // file.metadata.num_rows)
