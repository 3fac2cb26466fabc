"""`prepare`: text to a data folder. The text is read twice: to survey it, and to tokenise it on all cores."""

import hashlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from gpt_jax.config import TextConfig, check
from gpt_jax.data.formats import Block
from gpt_jax.data.pool import WorkerPool
from gpt_jax.data.shards import (
    FORMAT_VERSION,
    META_FILE,
    SPLITS,
    Meta,
    SplitName,
    SplitWriter,
    save_meta,
    token_dtype,
)
from gpt_jax.data.sources import Corpus, open_corpus
from gpt_jax.data.split import ByDocument, ByPosition, choose_split
from gpt_jax.data.train_tokenizer import TextSample, train_sentencepiece
from gpt_jax.data.worker import END_OF_DOCUMENT, START_OF_DOCUMENT
from gpt_jax.errors import UserError
from gpt_jax.storage.files import check_replaceable, whole_folder
from gpt_jax.storage.folders import check_remote_replaceable, whole_remote_folder
from gpt_jax.storage.remote import AnyPath, RemotePath, location
from gpt_jax.system import available_cores
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer, after_cut

SAMPLE_BYTES = 8 << 20  # Most text that a tokenizer is trained on, which takes up to 70 times its size in memory.
TASK_BYTES = 1 << 20  # Text that a worker tokenises at one time.


PathFlag = Annotated[
    AnyPath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: location(words[0]),
        is_instance=lambda value: isinstance(value, AnyPath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""The type of a flag that names a local or remote path."""


@dataclass(frozen=True, kw_only=True)
class PrepareArgs(TextConfig):
    """Turn text into token files."""

    source: tyro.conf.Positional[tuple[str, ...]]  # Files, folders, globs, or the corpora python-docs and shakespeare.
    out: PathFlag  # Folder to make, here or at an address such as s3://bucket/folder.
    # Field or column of JSON and Parquet with the text, nested as in meta.text; empty: files are read as they are.
    text_field: str = "text"
    # Replace --out, if it is a data folder, once the new one is complete.
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self) -> None:
        check(len(self.source) > 0, "source", self.source, "one or more files, folders, globs or corpora")
        self.check_values()


def print_summary(folder: AnyPath, meta: Meta) -> None:
    """Prints a summary of a data folder in four lines."""
    print(folder)
    for name, split in (("training", meta.train), ("validation", meta.val)):
        print(f"  {name:<11}{split.tokens:>15,} tokens{split.documents:>13,} documents{split.bytes / 1e6:>13,.1f} MB")
    ratio = (meta.train.bytes + meta.val.bytes) / (meta.train.tokens + meta.val.tokens)
    print(f"  {'vocabulary':<11}{meta.vocab_size:>15,} tokens{ratio:>13.2f} bytes a token")


def prepare(args: PrepareArgs, n_workers: int = 0, tokenizer: Tokenizer | None = None) -> Meta:
    """Makes the data folder `args.out`, whole or not at all.

    n_workers: tokenising processes; 0: one per core. The files do not depend on it. tokenizer: None for the one that
    `args` name. Raises UserError for what the user can fix, and SystemExit after SIGTERM; after either, as after
    Ctrl-C, `args.out` is unchanged.
    """
    with _exit_on_sigterm():
        try:
            if isinstance(args.out, RemotePath):
                check_remote_replaceable(args.out, META_FILE, args.force)
                whole = whole_remote_folder(args.out, META_FILE)
            else:
                check_replaceable(args.out, META_FILE, args.force)
                whole = whole_folder(args.out)
            tokenizer = tokenizer or _existing_tokenizer(args)
            corpus = open_corpus(args.source, args.text_field)
            with whole as folder:  # Made and locked before the text is read, which may take hours.
                survey = _survey(corpus, args.val_fraction)
                tokenizer = tokenizer or _make_tokenizer(args, survey.sample)
                settings = {
                    **{name: value for name, value in asdict(args).items() if name not in ("out", "force")},
                    "source": list(args.source),  # A list, as JSON gives it back.
                    "split": "by document" if isinstance(survey.split, ByDocument) else "by position",
                }
                return _write(folder, corpus, survey, tokenizer, settings, n_workers or available_cores())
        except OSError as e:
            raise UserError(f"{args.out} could not be written ({e.strerror or e}); it is as it was before") from e


@dataclass(frozen=True)
class _Survey:
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


def _survey(corpus: Corpus, val_fraction: float) -> _Survey:
    """Reads the corpus once, so that errors in it appear before anything is written, and decides the split."""
    fingerprint, sample = _Fingerprint(), TextSample(SAMPLE_BYTES)
    total_bytes = val_bytes = 0
    with _progress_bar("reading", corpus.n_bytes) as bar:
        for split, block in ByDocument(val_fraction)(corpus.blocks(bar.update)):
            fingerprint.add(block)
            sample.add(block.text)
            total_bytes += len(block.text)
            val_bytes += len(block.text) * (split == "val")
    if total_bytes == 0:
        raise UserError("there is no text: every document is empty")
    return _Survey(str(fingerprint), choose_split(val_fraction, total_bytes, val_bytes), sample)


def _existing_tokenizer(args: PrepareArgs) -> Tokenizer | None:
    """The tokenizer that `args` name; None when it is to be trained."""
    if args.tokenizer == "bytes":
        return ByteTokenizer()
    return None if args.tokenizer == "sentencepiece" else load_tokenizer(Path(args.tokenizer))


def _make_tokenizer(args: PrepareArgs, sample: TextSample) -> Tokenizer:
    """A tokenizer trained on `sample`."""
    print(f"training a {args.model_type} vocabulary on {sample.n_bytes / 1e6:.1f} MB of the text", file=sys.stderr)
    return SentencePieceTokenizer(train_sentencepiece(sample, args.model_type, args.vocab_size))


def _write(
    folder: Path, corpus: Corpus, survey: _Survey, tokenizer: Tokenizer, settings: dict[str, Any], n_workers: int
) -> Meta:
    """Tokenises the corpus into `folder`."""
    tokenizer_file = tokenizer.save(folder)
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
        _progress_bar("tokenizing", corpus.n_bytes) as bar,
        WorkerPool(tokenizer_file, n_workers) as pool,
        SplitWriter(folder, "train", vocab_size, end_of_text) as train,
        SplitWriter(folder, "val", vocab_size, end_of_text) as val,
    ):
        writers = {"train": train, "val": val}
        for name, tokens in pool.encode(tasks()):
            writers[name].write(np.frombuffer(tokens, token_dtype(vocab_size)))
        if str(fingerprint) != survey.fingerprint:
            raise UserError("the text was changed while it was read; prepare it again")
        if 0 in n_bytes.values():
            raise UserError(f"{sum(n_bytes.values())} bytes of text are too few for training and validation")
        meta = Meta(
            format_version=FORMAT_VERSION,
            dtype=token_dtype(vocab_size).name,
            vocab_size=vocab_size,
            tokenizer_file=tokenizer_file.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            source_fingerprint=survey.fingerprint,
            train=train.finish(n_bytes["train"]),
            val=val.finish(n_bytes["val"]),
            settings=settings,
        )
    save_meta(folder, meta)
    return meta


def _progress_bar(label: str, n_bytes: int) -> "tqdm[Any]":
    """A bar that shows MB/s and the time left, on a terminal only."""
    return tqdm(total=n_bytes, desc=f"{label:<10}", unit="B", unit_scale=True, disable=None)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM unwind the stack, as Ctrl-C does, instead of ending the process at once."""
    # Handlers can be set in the main thread only. Training has one of its own.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
