"""Texts to a data folder. They are read twice: to survey them, and to tokenise them on all cores."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.engines import Engine
from gpt_jax.data.formats import Block
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.shards import SPLITS, Split, SplitName, SplitWriter, token_dtype
from gpt_jax.data.sources import Documents
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
    sample: TextSample


class _Fingerprint:
    """SHA-256 of the text, each document followed by END_OF_DOCUMENT."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, block: Block) -> None:
        self._sha256.update(block.text)
        if block.ends_document:
            self._sha256.update(END_OF_DOCUMENT)

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def survey_texts(corpus: Documents, val_fraction: float) -> TextSurvey:
    """Reads the corpus once, so that errors in it appear before anything is written, and decides the split."""
    fingerprint, sample = _Fingerprint(), TextSample(SAMPLE_BYTES)
    total_bytes = val_bytes = 0
    with progress_bar("reading", corpus.n_bytes) as bar:
        for split, block in ByDocument(val_fraction)(corpus.blocks(bar.update)):
            fingerprint.add(block)
            sample.add(block.text)
            total_bytes += len(block.text)
            val_bytes += len(block.text) * (split == "val")
    if total_bytes == 0:
        raise UserError("there is no text: every document is empty")
    return TextSurvey(str(fingerprint), choose_split(val_fraction, total_bytes, val_bytes), sample)


def write_texts(
    folder: Path, corpus: Documents, survey: TextSurvey, tokenizer: Tokenizer, tokenizer_file: Path, engine: Engine
) -> dict[SplitName, Split]:
    """Tokenises the corpus into `folder`. tokenizer_file: where the tokenizer was saved."""
    fingerprint = _Fingerprint()
    n_bytes = dict.fromkeys(SPLITS, 0)

    def tasks() -> Iterator[tuple[SplitName, bytes]]:
        """The text of both splits in pieces of TASK_BYTES or more, each of one split, cut where the tokenizer may."""
        waiting = {name: bytearray() for name in SPLITS}
        within_document = dict.fromkeys(SPLITS, False)
        for name, block in survey.split(fingerprinted()):
            n_bytes[name] += len(block.text)
            waiting[name] += START_OF_DOCUMENT * (not within_document[name])
            waiting[name] += block.text + END_OF_DOCUMENT * block.ends_document
            within_document[name] = not block.ends_document
            if len(waiting[name]) >= TASK_BYTES:
                uncut = b"" if block.ends_document else after_cut(tokenizer, block.text)
                if len(uncut) < len(block.text):
                    yield name, bytes(waiting[name][: len(waiting[name]) - len(uncut)])
                    waiting[name][:] = uncut
        yield from ((name, bytes(text)) for name, text in waiting.items())

    def fingerprinted() -> Iterator[Block]:
        for block in corpus.blocks(bar.update):
            fingerprint.add(block)
            yield block

    vocab_size, end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
    with (
        progress_bar("tokenizing", corpus.n_bytes) as bar,
        engine("text", tokenizer_file) as pool,
        SplitWriter(folder, "train", vocab_size) as train,
        SplitWriter(folder, "val", vocab_size) as val,
    ):
        writers: dict[SplitName, SplitWriter] = {"train": train, "val": val}
        for name, result in pool.encode(tasks()):
            tokens = np.frombuffer(result, token_dtype(vocab_size))
            writers[name].write(tokens, np.flatnonzero(tokens == end_of_text) + 1)
        if str(fingerprint) != survey.fingerprint:
            raise UserError("the text was changed while it was read; prepare it again")
        if 0 in n_bytes.values():
            raise UserError(f"{sum(n_bytes.values())} bytes of text are too few for training and validation")
        return {name: writer.finish(n_bytes[name]) for name, writer in writers.items()}
