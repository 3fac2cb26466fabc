"""Problems as tokens: prompts to be answered, and the fields from which a reward judges the answer.

In a data folder, a document is a prompt, up to where its answer begins. `train-fields.jsonl` and `val-fields.jsonl`
have an object a line for each, with the other fields of its record, and `train-fields.bin` and `val-fields.bin` the
places where these lines begin, in bytes, and where the last one ends, uint64, little endian.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.data.encoded import Document, Encoded
from gpt_jax.data.records import RecordError
from gpt_jax.data.shards import Dataset, SplitName, map_file
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import Chat
from gpt_jax.tokenizer.tokenizer import Tokenizer

FIELDS_AT_ONCE = 4096
"""Problems whose fields are read in one request, where a file is far away."""


def documents(tokenizer: Tokenizer, chat: Chat, record: Mapping[str, Any]) -> tuple[list[Document], Counter[str]]:
    """The document of a problem, the tokens of `Tokenizer.encode_chat`, and what it counts; its bytes are those of what
    the messages say. Raises RecordError when the template refuses it."""
    try:
        prompt = chat.prompt(record["prompt"], record["tools"])
    except UserError as e:
        raise RecordError("a template refuses it", str(e)) from e
    n_bytes = sum(len(message["content"].encode()) for message in record["prompt"])
    line = json.dumps(record["fields"], ensure_ascii=False)
    return [Document(prompt, [False] * len(prompt), line=line)], Counter(problems=1, bytes=n_bytes)


def _fields_files(name: SplitName) -> tuple[str, str]:
    return f"{name}-fields.jsonl", f"{name}-fields.bin"


class FieldsWriter:
    """Writes the fields of a split."""

    def __init__(self, folder: Path, name: SplitName) -> None:
        self._lines, self._places = (folder / file for file in _fields_files(name))
        self._sizes = [0]

    def write(self, encoded: Encoded) -> None:
        """Appends those of more documents."""
        lines = [f"{line}\n".encode() for line in encoded.lines]
        self._sizes += map(len, lines)
        with self._lines.open("ab") as f:
            f.writelines(lines)

    def finish(self) -> list[Path]:
        """The files, complete."""
        self._places.write_bytes(np.cumsum(self._sizes).astype("<u8").tobytes())
        return [self._lines, self._places]


class Problem(NamedTuple):
    """A problem that is drawn."""

    number: int  # In its split.
    prompt: np.ndarray  # int32 (P,): its tokens, up to where the answer begins.
    fields: dict[str, Any]  # Of its record, besides the prompt.


class ProblemFiles:
    """The problems of one split of a data folder."""

    def __init__(self, data: Dataset, name: SplitName) -> None:
        """Raises UserError when the folder is no problem set, or a file of it is missing or does not fit."""
        data.check_format("grpo")
        self._tokens = data.split(name)
        starts = self._tokens.document_starts.astype(np.int64)
        self._starts, self.lengths = starts.tolist(), np.diff(starts, append=len(self._tokens))
        lines, places = (data.folder / file for file in _fields_files(name))
        self._places = map_file(places, np.dtype("<u8"), len(starts) + 1)[:].tolist()
        self._lines, self._file = map_file(lines, np.dtype(np.uint8), self._places[-1]), lines
        data.check_unchanged()

    def __len__(self) -> int:
        """Number of problems."""
        return len(self._starts)

    def problem(self, index: int) -> Problem:
        """One of them. Raises IndexError outside of 0 to problems - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        [fields] = self._fields(index, index + 1)
        return Problem(index, self._tokens.read(self._starts[index], int(self.lengths[index])), fields)

    def fields(self) -> Iterator[dict[str, Any]]:
        """Those of each problem, in order, without their prompts; many are read at once."""
        for start in range(0, len(self), FIELDS_AT_ONCE):
            yield from self._fields(start, min(start + FIELDS_AT_ONCE, len(self)))

    def _fields(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        first = self._places[start]
        lines = self._lines[first : self._places[stop]].tobytes()
        for index in range(start, stop):
            line = lines[self._places[index] - first : self._places[index + 1] - first]
            try:
                yield json.loads(line)
            except ValueError as e:
                raise UserError(f"{self._file}, line {index + 1}, is damaged ({e}); prepare the data again") from e
