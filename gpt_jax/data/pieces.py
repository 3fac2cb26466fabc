"""How a corpus is read and worked on: readers give pieces of its parts, and an engine has their tasks done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpt_jax.data.sources import Corpus

PROGRESS_BYTES = 16 << 20


class Piece(NamedTuple):
    """A task for workers, or a finding of the reader's own, which passes them by."""

    n_read: int  # Bytes of the sources since the last piece.
    label: Any = None  # What JSON can hold.
    content: bytes = b""
    is_task: bool = False


class Reading:
    """Counts the bytes that are read of sources, as `Corpus.blocks` tells it."""

    def __init__(self) -> None:
        self._n_read = 0

    def __call__(self, n_read: int) -> None:
        self._n_read += n_read

    @property
    def is_due(self) -> bool:
        """Whether a piece should tell of it."""
        return self._n_read >= PROGRESS_BYTES

    def piece(self, label: Any = None, content: bytes = b"", is_task: bool = False) -> Piece:
        """A piece with what was read since the last one."""
        n_read, self._n_read = self._n_read, 0
        return Piece(n_read, label, content, is_task)


Reader = Callable[[Any], Iterator[Piece]]
"""Reads one of several items, such as a part of a corpus. It can be pickled, and gives the same pieces each time."""


class Job(NamedTuple):
    """What workers do with the content of each task."""

    name: str  # Of `worker.JOBS`.
    argument: str | Path  # A text, or the file of a tokenizer; in its folder are no files but those that belong to it.


class Engine(Protocol):
    """Reads items, and has workers do what is in them."""

    def run(
        self, title: str, corpus: Corpus, read: Reader, items: Sequence[Any], job: Job | None = None
    ) -> AbstractContextManager[Iterator[tuple[Any, bytes]]]:
        """Gives (label, content) of the pieces of all items, in their order, behind a progress bar; of a task, what
        the job made of its content. Labels may have lists where the reader gave tuples.

        items: parts of the corpus, and what their reader needs to know of them.

        Raises what the reader raises, and UserError when workers die of a task again and again.
        """
