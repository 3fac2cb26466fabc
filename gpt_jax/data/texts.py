"""Texts to a data folder. They are read twice: to survey them, and to tokenise them on all cores."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gpt_jax.data.formats import Block
from gpt_jax.data.pieces import Engine, Job, Piece, Reading
from gpt_jax.data.shards import SPLITS, Split, SplitName, SplitWriter, token_dtype
from gpt_jax.data.sources import Corpus
from gpt_jax.data.split import ByDocument, ByPosition, choose_split
from gpt_jax.data.train_tokenizer import SAMPLE_BYTES, TextSample
from gpt_jax.data.worker import END_OF_DOCUMENT, START_OF_DOCUMENT
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.tokenizer import Tokenizer, after_cut

TASK_BYTES = 1 << 20  # Text that a worker tokenises at one time.


@dataclass(frozen=True)
class TextSurvey:
    """The results of reading a corpus once."""

    fingerprint: str
    split: ByDocument | ByPosition
    starts: list[int]  # Of each of `Corpus.parts`: bytes of text before it.
    sample: TextSample


def fingerprint(digests: Iterable[str]) -> str:
    """The fingerprint of a corpus: the digest of its one source, or SHA-256 of the digests of several.

    A source that is empty has none, and does not count. The digest of a text is SHA-256 of its documents, each followed
    by END_OF_DOCUMENT.
    """
    of_sources = [digest for digest in digests if digest]
    return of_sources[0] if len(of_sources) == 1 else hashlib.sha256("".join(of_sources).encode()).hexdigest()


class _Digest:
    """SHA-256 of the text of a source, each document followed by END_OF_DOCUMENT; empty without a document."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._empty = True

    def add(self, block: Block) -> None:
        self._empty = False
        self._sha256.update(block.text)
        if block.ends_document:
            self._sha256.update(END_OF_DOCUMENT)

    def __str__(self) -> str:
        return "" if self._empty else self._sha256.hexdigest()


def survey_texts(corpus: Corpus, val_fraction: float, engine: Engine) -> TextSurvey:
    """Reads the corpus once, so that errors in it appear before anything is written, and decides the split."""
    digests, starts, sample = list[str](), [0], TextSample(SAMPLE_BYTES)
    val_bytes = 0
    with engine.run("reading", corpus, partial(_surveyed, val_fraction), corpus.parts()) as findings:
        for label, content in findings:
            if label is not None:
                digests += label["digests"]
                starts.append(starts[-1] + label["bytes"])
                val_bytes += label["val_bytes"]
                sample.merge(label["sample"], content)
    total_bytes = starts.pop()
    if total_bytes == 0:
        raise UserError("there is no text: every document is empty")
    split = choose_split(val_fraction, total_bytes, val_bytes)
    return TextSurvey(fingerprint(digests), split, starts, sample)


def _surveyed(val_fraction: float, part: Corpus) -> Iterator[Piece]:
    """See survey_texts."""
    reading, sample, sizes = Reading(), TextSample(SAMPLE_BYTES), dict.fromkeys(SPLITS, 0)
    digests = list[str]()
    for number, source in part.each():
        digest = _Digest()
        sample.begin(number)
        for name, block in ByDocument(val_fraction)(source.blocks(reading)):
            digest.add(block)
            sample.add(block.text)
            sizes[name] += len(block.text)
            if reading.is_due:
                yield reading.piece()
        digests.append(str(digest))
    header, content = sample.packed()
    found = {"digests": digests, "bytes": sum(sizes.values()), "val_bytes": sizes["val"], "sample": header}
    yield reading.piece(found, content)


def write_texts(
    folder: Path, corpus: Corpus, survey: TextSurvey, tokenizer: Tokenizer, tokenizer_file: Path, engine: Engine
) -> dict[SplitName, Split]:
    """Tokenises the corpus into `folder`. tokenizer_file: where the tokenizer was saved."""
    digests, n_bytes = list[str](), dict.fromkeys(SPLITS, 0)
    items = [(part, survey.split.after(n)) for part, n in zip(corpus.parts(), survey.starts, strict=True)]
    vocab_size, end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
    read, job = partial(_tasks, tokenizer), Job("text", tokenizer_file)
    with (
        engine.run("tokenizing", corpus, read, items, job) as done,
        SplitWriter(folder, "train", vocab_size) as train,
        SplitWriter(folder, "val", vocab_size) as val,
    ):
        writers: dict[SplitName, SplitWriter] = {"train": train, "val": val}
        for label, content in done:
            if isinstance(label, dict):
                digests += label["digests"]
                for name in SPLITS:
                    n_bytes[name] += label["bytes"][name]
            elif label is not None:
                tokens = np.frombuffer(content, token_dtype(vocab_size))
                writers[label].write(tokens, np.flatnonzero(tokens == end_of_text) + 1)
        if fingerprint(digests) != survey.fingerprint:
            raise UserError("the text was changed while it was read; prepare it again")
        if 0 in n_bytes.values():
            raise UserError(f"{sum(n_bytes.values())} bytes of text are too few for training and validation")
        return {name: writer.finish(n_bytes[name]) for name, writer in writers.items()}


def _tasks(tokenizer: Tokenizer, item: tuple[Corpus, ByDocument | ByPosition]) -> Iterator[Piece]:
    """The text of both splits in pieces of TASK_BYTES or more, each of one split, cut where the tokenizer may; and at
    the end what was read."""
    (part, split), reading = item, Reading()
    digests, n_bytes = list[_Digest](), dict.fromkeys(SPLITS, 0)

    def read() -> Iterator[Block]:
        for _, source in part.each():
            digests.append(_Digest())
            for block in source.blocks(reading):
                digests[-1].add(block)
                yield block

    waiting = {name: bytearray() for name in SPLITS}
    within_document = dict.fromkeys(SPLITS, False)
    for name, block in split(read()):
        n_bytes[name] += len(block.text)
        waiting[name] += START_OF_DOCUMENT * (not within_document[name])
        waiting[name] += block.text + END_OF_DOCUMENT * block.ends_document
        within_document[name] = not block.ends_document
        if len(waiting[name]) >= TASK_BYTES:
            uncut = b"" if block.ends_document else after_cut(tokenizer, block.text)
            if len(uncut) < len(block.text):
                yield reading.piece(name, bytes(waiting[name][: len(waiting[name]) - len(uncut)]), is_task=True)
                waiting[name][:] = uncut
        if reading.is_due:
            yield reading.piece()
    for name, text in waiting.items():
        if text:
            yield reading.piece(name, bytes(text), is_task=True)
    yield reading.piece({"digests": [str(digest) for digest in digests], "bytes": n_bytes})
