"""What cleaning keeps of a corpus, judged by workers."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from typing import TypeVar

from gpt_jax.config import CleanConfig
from gpt_jax.data.clean import SEPARATOR, Cleaner, Report, Selection, normalized, verdicts
from gpt_jax.data.formats import Block, cut_document
from gpt_jax.data.pieces import Engine, Job, Piece, Reading
from gpt_jax.data.sources import Corpus
from gpt_jax.errors import UserError

TASK_BYTES = 1 << 20  # Text that a worker judges at one time.
T = TypeVar("T")

Texts = Callable[[Corpus, Reading], Iterator[tuple[str, bytes]]]
"""The texts to judge of a corpus, each with its name; without one, it is its number. It can be pickled."""


def judge(corpus: Corpus, texts: Texts, config: CleanConfig, engine: Engine) -> tuple[list[bytes], Report]:
    """Reads and judges all texts, which does not depend on the number of workers.

    Gives, of each source, a byte for each text: 1 if it is kept, else 0. Each text is held in memory as a whole. Raises
    UserError for a language that is not known, and for a package that is not installed.
    """
    Cleaner(config)  # Raises here, not in a worker.
    selection, marks = Selection(config), [bytearray() for _ in corpus.sources]
    job = Job("clean", json.dumps(asdict(config)))
    with engine.run("cleaning", corpus, partial(_tasks, texts), corpus.parts(), job) as judged:
        for label, content in judged:
            if label is not None:
                for (number, name), verdict in zip(label, verdicts(content), strict=True):
                    where = name or f"document {selection.report.documents + 1}"
                    marks[number].append(selection.keep(where, verdict))
    return [bytes(of_source) for of_source in marks], selection.report


def _tasks(texts: Texts, part: Corpus) -> Iterator[Piece]:
    reading, waiting, label, size = Reading(), list[bytes](), list[tuple[int, str]](), 0
    for number, source in part.each():
        for name, text in texts(source, reading):
            waiting.append(text)
            label.append((number, name))
            size += len(text) + len(SEPARATOR)
            if size >= TASK_BYTES:
                yield reading.piece(label, SEPARATOR.join(waiting), is_task=True)
                waiting, label, size = [], [], 0
            if reading.is_due:
                yield reading.piece()
    if waiting:
        yield reading.piece(label, SEPARATOR.join(waiting), is_task=True)
    yield reading.piece()


def kept(texts: Iterable[T], marks: bytes) -> Iterator[T]:
    """Those of a source's texts that are marked as kept. Raises UserError when they are not as many as were judged."""
    for text, mark in zip_longest(texts, marks):
        if text is None or mark is None:
            raise UserError("a source was changed while it was read; prepare it again")
        if mark:
            yield text


def clean_corpus(corpus: Corpus, config: CleanConfig, engine: Engine) -> tuple[Corpus, Report]:
    """The corpus without the documents that are removed, and the others normalised. See `judge`."""
    marks_of_sources, report = judge(corpus, _numbered, config, engine)
    cleaned = [
        replace(source, blocks=partial(_kept_blocks, Corpus((source,)), marks, config))
        for source, marks in zip(corpus.sources, marks_of_sources, strict=True)
    ]
    return replace(corpus, sources=tuple(cleaned)), report


def _numbered(corpus: Corpus, reading: Reading) -> Iterator[tuple[str, bytes]]:
    return (("", text) for text, _ in _documents(corpus, reading))


def _kept_blocks(corpus: Corpus, marks: bytes, config: CleanConfig) -> Iterator[Block]:
    for text, position in kept(_documents(corpus, lambda _: None), marks):
        yield from cut_document(normalized(text.decode(), config).encode(), position)


def _documents(corpus: Corpus, progress: Callable[[int], object]) -> Iterator[tuple[bytes, int]]:
    """The text of each document, and the bytes of its source read so far."""
    text = bytearray()
    for block in corpus.blocks(progress):
        text += block.text
        if block.ends_document:
            yield bytes(text), block.position
            text.clear()
