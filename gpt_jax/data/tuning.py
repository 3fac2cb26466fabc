"""Conversations, preferences and problems to a data folder: their tokens, and which of them are to be learnt."""

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.config import CleanConfig
from gpt_jax.data.clean import Report, normalized
from gpt_jax.data.cleaned import judge, kept
from gpt_jax.data.encoded import unpacked
from gpt_jax.data.messages import Content, Conversation, Format, Message, parsed
from gpt_jax.data.pieces import Engine, Job, Piece, Reading
from gpt_jax.data.preferences import LengthsWriter
from gpt_jax.data.problems import FieldsWriter
from gpt_jax.data.records import Record, RecordError, Skipped, fail
from gpt_jax.data.shards import SPLITS, Split, SplitName, SplitWriter
from gpt_jax.data.sources import Corpus
from gpt_jax.data.texts import fingerprint
from gpt_jax.data.train_tokenizer import SAMPLE_BYTES, TextSample
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

TASK_BYTES = 1 << 18  # Conversations, as JSON, that a worker tokenises at one time.
NOUNS: dict[str, str] = {
    "chat": "conversations",
    "completion": "conversations",
    "preference": "preferences",
    "problem": "problems",
}
SETS: dict[str, type[LengthsWriter] | type[FieldsWriter]] = {"preference": LengthsWriter, "problem": FieldsWriter}
"""The formats that are no text to learn, with what writes the files beside their tokens."""


@dataclass(frozen=True)
class Parsing:
    """How records become conversations, preferences or problems. It can be pickled."""

    format: Format
    messages_field: str  # The field of messages, if it has a name of its own.
    skip_broken: bool  # Pass over lines that are no JSON.
    trim: bool  # Take white space off both ends of every message.
    clean: CleanConfig

    def __call__(self, corpus: Corpus, reading: Reading, skipped: Skipped) -> Iterator[tuple[Record, Content]]:
        """What the records of the corpus hold. What is left out is told to `skipped`."""
        records = map(self._named, corpus.records(reading, skipped if self.skip_broken else fail))
        for record, found in parsed(records, self.format, skipped):
            yield record, self._changed(found)

    def _named(self, record: Record) -> Record:
        name, value = self.messages_field, record.value
        return record._replace(value={**value, "messages": value[name]}) if name and name in value else record

    def _changed(self, found: Content) -> Content:
        """What was found, with the contents of messages that `trim` and `clean` ask for."""
        if not self.trim and self.clean.normalize == "none":
            return found

        def changed(content: str) -> str:
            return normalized(content.strip() if self.trim else content, self.clean)

        parts: dict[str, Any] = {
            name: tuple({**message, "content": changed(message["content"])} for message in part)
            for name, part in _parts(found).items()
        }
        return found._replace(**parts)


class Kept(NamedTuple):
    """A part of a corpus, with what cleaning keeps of it."""

    corpus: Corpus
    marks: list[bytes] | None  # Of each source, a byte for each conversation: 1 if it is kept, else 0; None: all are.
    n_before: int = 0  # Conversations that are kept of the parts before.

    def read(self, parsing: Parsing, reading: Reading, skipped: Skipped) -> Iterator[tuple[int, Record, Content]]:
        """What is kept, with the number of its source. See Parsing."""
        for i, (number, source) in enumerate(self.corpus.each()):
            found = parsing(source, reading, skipped)
            for record, content in found if self.marks is None else kept(found, self.marks[i]):
                yield number, record, content


@dataclass(frozen=True)
class Conversations:
    """The conversations, preferences or problems of a corpus, which can be read repeatedly."""

    corpus: Corpus
    parsing: Parsing
    marks: list[bytes] | None  # See Kept.
    cleaning: Report | None

    def parts(self) -> list[Kept]:
        """They, in the parts of the corpus."""
        marks = self.marks
        parts = [(part, slice(part.first, part.first + len(part.sources))) for part in self.corpus.parts()]
        return [Kept(part, marks and marks[sources]) for part, sources in parts]


def open_conversations(corpus: Corpus, parsing: Parsing, engine: Engine) -> Conversations:
    """Judges what the records hold, if cleaning is asked for. Says on stderr what it removes."""
    if not parsing.clean.active:
        return Conversations(corpus, parsing, None, None)
    marks, report = judge(corpus, partial(_texts, parsing), parsing.clean, engine)
    print("\n".join(report.lines()), file=sys.stderr)
    return Conversations(corpus, parsing, marks, report)


def _texts(parsing: Parsing, corpus: Corpus, reading: Reading) -> Iterator[tuple[str, bytes]]:
    return ((record.where, text_of(content).encode()) for record, content in parsing(corpus, reading, Skipped()))


class Division(NamedTuple):
    """Which ones are for validation."""

    name: str
    val_below: int  # Those whose `hash_of` is less,
    first_val: int | None = None  # or those from this number on, if it is given.

    def side(self, number: int, content: Content) -> SplitName:
        """The split of one of them. number: counted from 0."""
        if self.first_val is None:
            return "val" if hash_of(content) < self.val_below else "train"
        return "val" if number >= self.first_val else "train"


class ConversationSurvey(NamedTuple):
    """The results of reading conversations once."""

    fingerprint: str  # See `texts.fingerprint`; of each source, SHA-256 of its conversations.
    division: Division
    starts: list[int]  # Of each part: conversations in those before.
    sample: TextSample  # Of what they say.


def _parts(content: Content) -> dict[str, tuple[Message, ...]]:
    """The messages, by the names of the fields that they are in."""
    return {name: part for name, part in content._asdict().items() if isinstance(part, tuple)}


def text_of(content: Content) -> str:
    """What all messages say."""
    return "\n".join(message["content"] for part in _parts(content).values() for message in part)


def line_of(content: Content) -> bytes:
    """A conversation, preference or problem as JSON, in one line. Fields keep their order, in which templates write the
    arguments of calls and the tools."""
    return json.dumps(content._asdict(), ensure_ascii=False).encode()


def hash_of(content: Content) -> int:
    """A hash of 64 bits, which decides the split: of a conversation; of what a prompt says, so that all preferences and
    problems with one prompt are on one side."""
    if isinstance(content, Conversation):
        key = line_of(content)
    else:
        key = json.dumps([(message["role"], message["content"]) for message in content.prompt]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def divide(hashes: Sequence[int], sizes: Sequence[int], fraction: float, by_prompt: bool) -> Division:
    """The division by hash, with a fraction of all hashes for validation, unless that misses the fraction of the sizes
    by more than half of the smaller side, as it does with few.

    Then the last conversations are for validation or, by_prompt, those below the hash that comes nearest to the
    fraction. There are two conversations or two different hashes at least, and neither side is empty.
    """
    all_hashes, all_sizes, total = np.array(hashes, np.uint64), np.array(sizes, np.float64), sum(sizes)
    name, val_below = "by prompt" if by_prompt else "by conversation", int(fraction * 2**64)
    if abs(all_sizes[all_hashes < val_below].sum() / total - fraction) <= min(fraction, 1 - fraction) / 2:
        return Division(name, val_below)
    if by_prompt:
        different, which = np.unique(all_hashes, return_inverse=True)
        sizes_before = np.cumsum(np.bincount(which, all_sizes))[:-1]
        return Division(name, int(different[1 + np.argmin(np.abs(sizes_before / total - fraction))]))
    starts = np.cumsum(sizes) - sizes
    first_val = min(max(1, int(np.searchsorted(starts, (1 - fraction) * total))), len(sizes) - 1)
    return Division("by position", val_below, first_val)


def survey_conversations(conversations: Conversations, fraction: float, engine: Engine) -> ConversationSurvey:
    """Reads all conversations, preferences or problems, so that errors in them appear before anything is written, and
    decides the split. Raises UserError when there are none for one of the sides."""
    digests, sample, skipped = list[str](), TextSample(SAMPLE_BYTES), Skipped()
    hashes, sizes, starts = array("Q"), array("Q"), [0]  # 16 bytes a conversation, where lists take 72.
    corpus, parsing = conversations.corpus, conversations.parsing
    with engine.run("reading", corpus, partial(_surveyed, parsing), conversations.parts()) as findings:
        for label, content in findings:
            if label is None:
                hashes.frombytes(content[: len(content) // 2])
                sizes.frombytes(content[len(content) // 2 :])
            else:  # The end of a part.
                starts.append(len(hashes))
                sample.merge(label["sample"], content)
                digests += label["digests"]
                skipped.merge(*label["skipped"])
    by_prompt = parsing.format in SETS
    if len({*hashes} if by_prompt else hashes) < 2:
        why = "; those with one prompt stay together" if len(sizes) > 1 else ""
        why += f"; {skipped.lines()[0]}" if skipped.counts else ""
        noun = NOUNS[parsing.format]
        raise UserError(f"{len(sizes)} {noun} are too few for training and validation{why}")
    division = divide(hashes, sizes, fraction, by_prompt)
    return ConversationSurvey(fingerprint(digests), division, starts[:-1], sample)


class _Digests:
    """SHA-256 of the lines of each source that has any."""

    def __init__(self) -> None:
        self._number = -1
        self._sha256 = list[Any]()

    def add(self, number: int, line: bytes) -> None:
        """number: that of the source."""
        if number != self._number:
            self._number = number
            self._sha256.append(hashlib.sha256())
        self._sha256[-1].update(line + b"\n")

    def all(self) -> list[str]:
        return [sha256.hexdigest() for sha256 in self._sha256]


def _surveyed(parsing: Parsing, part: Kept) -> Iterator[Piece]:
    """See survey_conversations."""
    reading, skipped, digests = Reading(), Skipped(), _Digests()
    sample, hashes, sizes, last = TextSample(SAMPLE_BYTES), array("Q"), array("Q"), -1
    for number, _, content in part.read(parsing, reading, skipped):
        if number != last:
            sample.begin(number)
            last = number
        line = line_of(content)
        digests.add(number, line)
        hashes.append(hash_of(content))
        sizes.append(len(line))
        sample.add(text_of(content).encode())
        if reading.is_due:
            yield reading.piece(content=hashes.tobytes() + sizes.tobytes())
            del hashes[:], sizes[:]
    yield reading.piece(content=hashes.tobytes() + sizes.tobytes())
    header, text = sample.packed()
    yield reading.piece({"digests": digests.all(), "sample": header, "skipped": skipped.packed()}, text)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """The tokenizer with a template that was given; without one, with its own; ours, if it has our special tokens.

    Raises UserError when there is none.
    """
    if template is None and tokenizer.chat_template is None:
        if not {*SPECIAL_TOKENS} <= {*tokenizer.special_tokens}:
            raise UserError("the tokenizer has no chat template, which writes conversations: --template FILE")
        template = TEMPLATE
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def write_conversations(
    folder: Path,
    conversations: Conversations,
    survey: ConversationSurvey,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    engine: Engine,
) -> tuple[dict[SplitName, Split], dict[str, Any]]:
    """Tokenises conversations, preferences or problems into `folder`. Returns the splits, and counts for meta.json.
    Says on stderr what was left out.

    Raises UserError when nothing is left for one of the splits.
    """
    skipped, digests, counts = Skipped(), list[str](), {name: Counter[str]() for name in SPLITS}
    parsing, kind, vocab_size = conversations.parsing, conversations.parsing.format, tokenizer.vocab_size
    masked = kind != "problem"  # Of a problem, nothing is learnt as text.
    beside = {name: SETS[kind](folder, name) for name in SPLITS if kind in SETS}
    read = partial(_tasks, parsing, survey.division)
    items = [part._replace(n_before=n) for part, n in zip(conversations.parts(), survey.starts, strict=True)]
    with (
        engine.run("tokenizing", conversations.corpus, read, items, Job(kind, tokenizer_file)) as done,
        SplitWriter(folder, "train", vocab_size, masked) as train,
        SplitWriter(folder, "val", vocab_size, masked) as val,
    ):
        writers: dict[SplitName, SplitWriter] = {"train": train, "val": val}
        for label, content in done:
            if isinstance(label, dict):
                digests += label["digests"]
                skipped.merge(*label["skipped"])
            elif label is not None:
                name, places = label
                encoded = unpacked(content, vocab_size)
                writers[name].write(encoded.tokens, encoded.ends, encoded.learnt if masked else None)
                if name in beside:
                    beside[name].write(encoded)
                counts[name] += encoded.counts
                for i, reason, message in encoded.refused:
                    skipped(RecordError(reason, f"{places[i]}: {message}"))
        if fingerprint(digests) != survey.fingerprint:
            raise UserError(f"the {NOUNS[kind]} were changed while they were read; prepare them again")
        if empty := [name for name in SPLITS if not counts[name]]:
            what = {"train": "training", "val": "validation"}[empty[0]]
            raise UserError(f"no {NOUNS[kind][:-1]} is left for {what}; {'; '.join(skipped.lines())}")
        files = {name: writer.finish() for name, writer in beside.items()}
        splits = {name: writers[name].finish(counts[name]["bytes"], files.get(name, [])) for name in SPLITS}
    for text in skipped.lines():
        print(text, file=sys.stderr)
    left_out = dict(sorted(skipped.counts.items()))
    report: dict[str, Any] = {name: dict(counts[name]) for name in SPLITS} | {"left out": left_out}
    return splits, report | ({"clean": conversations.cleaning.to_dict()} if conversations.cleaning else {})


def _tasks(parsing: Parsing, division: Division, part: Kept) -> Iterator[Piece]:
    """What is to be tokenised, in pieces of TASK_BYTES or more, each of one split; and at the end what was read."""
    reading, skipped, digests = Reading(), Skipped(), _Digests()
    waiting: dict[SplitName, list[bytes]] = {name: [] for name in SPLITS}
    places: dict[SplitName, list[str]] = {name: [] for name in SPLITS}

    def task(name: SplitName) -> Piece:
        piece = reading.piece((name, places[name]), b"\n".join(waiting[name]), is_task=True)
        waiting[name], places[name] = [], []
        return piece

    for i, (number, record, content) in enumerate(part.read(parsing, reading, skipped), part.n_before):
        line = line_of(content)
        digests.add(number, line)
        name = division.side(i, content)
        waiting[name].append(line)
        places[name].append(record.where)
        if sum(map(len, waiting[name])) >= TASK_BYTES:
            yield task(name)
        if reading.is_due:
            yield reading.piece()
    yield from (task(name) for name in SPLITS if waiting[name])
    yield reading.piece({"digests": digests.all(), "skipped": skipped.packed()})
