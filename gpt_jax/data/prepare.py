"""`prepare`: texts, conversations, preferences and problems to a data folder."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from gpt_jax.config import CleanConfig, TextConfig, check
from gpt_jax.data.cleaned import clean_corpus
from gpt_jax.data.engines import EngineName, open_engine
from gpt_jax.data.marked import as_text, runs, shortened
from gpt_jax.data.messages import Format, format_of
from gpt_jax.data.pieces import Engine
from gpt_jax.data.shards import (
    FORMAT_VERSIONS,
    META_FILE,
    Dataset,
    Meta,
    Split,
    SplitName,
    open_dataset,
    save_meta,
    token_dtype,
)
from gpt_jax.data.sources import first_record, open_corpus
from gpt_jax.data.split import ByDocument
from gpt_jax.data.texts import survey_texts, write_texts
from gpt_jax.data.train_tokenizer import TextSample, train_sentencepiece
from gpt_jax.data.tuning import (
    NOUNS,
    SETS,
    Parsing,
    open_conversations,
    survey_conversations,
    with_template,
    write_conversations,
)
from gpt_jax.errors import UserError
from gpt_jax.storage.files import check_replaceable, whole_folder
from gpt_jax.storage.folders import check_remote_replaceable, local_copy, whole_remote_folder
from gpt_jax.storage.remote import AnyPath, RemotePath, location
from gpt_jax.system import shows_color
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import syntax_error
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer

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

FormatName = Literal["auto", "text", "chat", "completion", "preference", "problem"]
EXAMPLE_CHARS = 1500  # Of an example that is printed.
OUT_OF_SETTINGS = ("out", "force", "engine", "workers")  # Not kept in meta.json: they do not decide what is made.


@dataclass(frozen=True, kw_only=True)
class PrepareArgs(TextConfig):
    """Turn text or conversations into token files."""

    # Files, folders, globs, datasets as hf:NAME,split=train, or the corpora python-docs and shakespeare.
    source: tyro.conf.Positional[tuple[str, ...]]
    out: PathFlag  # Folder to make, here or at an address such as s3://bucket/folder.
    # What records hold: texts, conversations, a prompt and its completion, or with a better and a worse answer, or with
    # what a reward needs; auto: looks.
    format: FormatName = "auto"
    # Field or column of JSON and Parquet with the text, nested as in meta.text; empty: files are read as they are.
    text_field: str = "text"
    messages_field: str = ""  # Field with the messages of a chat, if it is neither messages nor conversations.
    template: str = ""  # File with the Jinja template that writes conversations; empty: the tokenizer's own, or ours.
    trim: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # Take white space off both ends of every message.
    # With conversations: pass over lines of JSON Lines that are no JSON, and count them, instead of stopping there.
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    # Replace --out, if it is a data folder, once the new one is complete.
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    engine: EngineName = "local"  # Where it is done: on this machine, or on the Ray cluster at RAY_ADDRESS.
    workers: int = 0  # Processes that tokenize; 0: one per core, of this machine or of the cluster.
    clean: Annotated[CleanConfig, tyro.conf.arg(name="")] = field(default_factory=CleanConfig)

    def __post_init__(self) -> None:
        check(len(self.source) > 0, "source", self.source, "one or more files, folders, globs or corpora")
        check(self.format in get_args(FormatName), "format", self.format, " or ".join(get_args(FormatName)))
        chat = self.format in ("auto", "chat") or not self.messages_field
        check(chat, "messages_field", self.messages_field, f"left out with --format {self.format}; chats have it")
        check(self.engine in get_args(EngineName), "engine", self.engine, " or ".join(get_args(EngineName)))
        check(self.workers >= 0, "workers", self.workers, "0 (one per core) or more")
        self.check_values()


class Made(NamedTuple):
    """What a preparation wrote into its folder, besides meta.json."""

    format: Format
    tokenizer: Tokenizer
    tokenizer_file: Path
    splits: dict[SplitName, Split]
    fingerprint: str  # Of the source.
    split: str  # How it was divided.
    report: dict[str, Any]  # Counts of what was kept, and of what was left out and why.


def prepare(args: PrepareArgs, tokenizer: Tokenizer | None = None) -> Meta:
    """Makes the data folder `args.out`, whole or not at all.

    The files do not depend on the engine and the workers. tokenizer: None for the one that `args` name. Raises
    UserError for what the user can fix, and SystemExit after SIGTERM; after either, as after Ctrl-C, `args.out` is
    unchanged, unless it is remote and is being replaced: then it is no data folder any more.
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
            kind, fields = _format(args)
            prepare_kind = _prepare_texts if kind == "text" else _prepare_conversations
            # The folder is made and locked, and the cluster found, before the text is read, which may take hours.
            with whole as folder, open_engine(args.engine, args.workers) as engine:
                made = prepare_kind(folder, args, kind, tokenizer, engine)
                return _save(folder, args, made._replace(report={"format": f"{kind} ({fields})", **made.report}))
        except OSError as e:
            raise UserError(f"{args.out} could not be written ({e.strerror or e}); it is as it was before") from e


def _format(args: PrepareArgs) -> tuple[Format, str]:
    """The format of the sources: that which was given or, of the first record in them, that which it has; and the
    fields of the record that say so."""
    if args.format != "auto":
        return args.format, "as asked"
    if args.messages_field:
        return "chat", args.messages_field
    record = first_record(args.source) if args.text_field == "text" else None
    if record is None or args.text_field in record.value:
        return "text", args.text_field
    try:
        return format_of(record)
    except UserError:  # Reading it as texts tells which fields it has.
        return "text", args.text_field


def _prepare_texts(folder: Path, args: PrepareArgs, kind: Format, tokenizer: Tokenizer | None, engine: Engine) -> Made:
    for name, given in (("template", args.template), ("trim", args.trim), ("skip_broken", args.skip_broken)):
        check(not given, name, given, "left out with texts; conversations have it")
    corpus = open_corpus(args.source, args.text_field)
    report = dict[str, Any]()
    if args.clean.active:
        corpus, cleaning = clean_corpus(corpus, args.clean, engine)
        report = {"clean": cleaning.to_dict()}
        print("\n".join(cleaning.lines()), file=sys.stderr)
        if cleaning.documents and not cleaning.kept_documents:
            raise UserError("cleaning removed every document; see above for the reasons")
    survey = survey_texts(corpus, args.val_fraction, engine)
    tokenizer = tokenizer or _make_tokenizer(args, survey.sample)
    tokenizer_file = tokenizer.save(folder)
    splits = write_texts(folder, corpus, survey, tokenizer, tokenizer_file, engine)
    split = "by document" if isinstance(survey.split, ByDocument) else "by position"
    return Made(kind, tokenizer, tokenizer_file, splits, survey.fingerprint, split, report)


def _prepare_conversations(
    folder: Path, args: PrepareArgs, kind: Format, tokenizer: Tokenizer | None, engine: Engine
) -> Made:
    template = _read_template(args.template) if args.template else None
    corpus = open_corpus(args.source, of_records=True)
    parsing = Parsing(kind, args.messages_field, args.skip_broken, args.trim, args.clean)
    conversations = open_conversations(corpus, parsing, engine)
    survey = survey_conversations(conversations, args.val_fraction, engine)
    tokenizer = with_template(tokenizer or _make_tokenizer(args, survey.sample), template)
    tokenizer_file = tokenizer.save(folder)
    splits, report = write_conversations(folder, conversations, survey, tokenizer, tokenizer_file, engine)
    return Made(kind, tokenizer, tokenizer_file, splits, survey.fingerprint, survey.division.name, report)


def _save(folder: Path, args: PrepareArgs, made: Made) -> Meta:
    """Writes meta.json."""
    settings = {name: value for name, value in asdict(args).items() if name not in OUT_OF_SETTINGS}
    vocab_size = made.tokenizer.vocab_size
    masked = made.splits["train"].learnt is not None
    version = "set" if made.format in SETS else "masked" if masked else "plain"
    meta = Meta(
        format_version=FORMAT_VERSIONS[version],
        dtype=token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        tokenizer_file=made.tokenizer_file.name,
        tokenizer_fingerprint=made.tokenizer.fingerprint,
        source_fingerprint=made.fingerprint,
        train=made.splits["train"],
        val=made.splits["val"],
        settings=json.loads(json.dumps({**settings, "split": made.split})),  # Lists for tuples, as it will be read.
        format=made.format,
        report=made.report,
    )
    save_meta(folder, meta)
    return meta


def print_summary(folder: AnyPath, meta: Meta) -> None:
    """Prints a summary of a data folder in a few lines and, of conversations, an example."""
    print(folder)
    for name, split in (("training", meta.train), ("validation", meta.val)):
        line = f"  {name:<11}{split.tokens:>15,} tokens{split.documents:>13,} documents{split.bytes / 1e6:>13,.1f} MB"
        share = "" if split.learnt is None else f"{split.learnt:>15,} learnt ({split.learnt / split.tokens:.1%})"
        print(line + share)
    tokens = sum(split.tokens if split.learnt is None else split.learnt for split in (meta.train, meta.val))
    ratio = (meta.train.bytes + meta.val.bytes) / tokens
    print(f"  {'vocabulary':<11}{meta.vocab_size:>15,} tokens{ratio:>13.2f} bytes a token")
    if meta.format != "text":
        noun, left_out = NOUNS[meta.format], sum(meta.report["left out"].values())
        n, answers = (sum(meta.report[split].get(name, 0) for split in meta.splits) for name in (noun, "answers"))
        line = f"  {meta.report['format']}: {n:,} {noun}" + f" with {answers:,} answers to learn" * bool(answers)
        print(line + f"; records left out: {left_out:,}" * bool(left_out))
        if meta.format not in SETS:
            print_example(open_dataset(folder))


def print_example(data: Dataset) -> None:
    """Prints the first conversation for training, with what is learnt marked, and its middle left out if it is long."""
    starts, color = data.train.document_starts, shows_color()
    place = (0, int(starts[1]) if len(starts) > 1 else len(data.train))
    found = runs(data.tokenizer, data.train.read(*place), data.train.read_learnt(*place))
    print(f"the first example; what is learnt is {'green' if color else 'between ⟦ and ⟧'}:")
    print(as_text(shortened(found, EXAMPLE_CHARS), color))


def _existing_tokenizer(args: PrepareArgs) -> Tokenizer | None:
    """The tokenizer that `args` name; None when it is to be trained."""
    if args.tokenizer == "bytes":
        return ByteTokenizer()
    if args.tokenizer == "sentencepiece":
        return None
    place = location(args.tokenizer)
    if isinstance(place, RemotePath) and not place.exists():
        raise UserError(f"there is no tokenizer {place}")
    folder, name = (place, "") if place.is_dir() else (place.parent, place.name)
    with local_copy(folder, without=(".bin", ".safetensors")) as copy:
        return load_tokenizer(copy / name)


def _make_tokenizer(args: PrepareArgs, sample: TextSample) -> Tokenizer:
    """A tokenizer trained on `sample`."""
    print(f"training a {args.model_type} vocabulary on {sample.n_bytes / 1e6:.1f} MB of the text", file=sys.stderr)
    return SentencePieceTokenizer(train_sentencepiece(sample, args.model_type, args.vocab_size))


def _read_template(file: str) -> str:
    """The content of a template's file. Raises UserError."""
    try:
        template = Path(file).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"the template {file} cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the template {file} is not UTF-8 text") from e
    if wrong := syntax_error(template):
        raise UserError(f"the template {file} cannot be used: {wrong}")
    return template


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
