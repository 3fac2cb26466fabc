"""metrics.jsonl: one JSON object a logged step, appended as training goes on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, up to the first incomplete line; an empty list when there is no file."""
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # Also for bytes that are not UTF-8.
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class RecordWriter:
    """The records of a run that goes on from step `start`, old and new, in memory and in the file.

    Records after `start`, which a run wrote after its last checkpoint and before it was killed, are dropped, since
    they will be made again. A host with writes=False keeps records in memory only.
    """

    def __init__(self, path: Path, start: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.records = [record for record in read_records(path) if record["step"] <= start]
        if writes:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        self.file = (path if writes else Path(os.devnull)).open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record. Raises UserError when it cannot be written."""
        self.records.append(record)
        with self.writing():
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Forces the records to the disk. Raises UserError as `append` does."""
        if self.writes:
            with self.writing():
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file. Raises UserError as `append` does, again for what it could not write."""
        with self.writing():
            self.file.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises errors of the file as UserError, with its name."""
        try:
            yield
        except OSError as e:
            raise UserError(f"{self.path} cannot be written: {e.strerror}") from e
