"""Conversations, preferences and problems to a data folder: their tokens, and which of them are to be learnt."""

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.config import CleanConfig
from gpt_jax.data.clean import Cleaner, Selection, normalized
from gpt_jax.data.encoded import unpacked
from gpt_jax.data.engines import Engine
from gpt_jax.data.messages import Content, Conversation, Format, Message, parsed
from gpt_jax.data.preferences import LengthsWriter
from gpt_jax.data.problems import FieldsWriter
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.records import Record, RecordError, Skipped, fail
from gpt_jax.data.shards import SPLITS, Split, SplitName, SplitWriter
from gpt_jax.data.sources import Corpus
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


@dataclass
class Conversations:
    """The conversations, preferences or problems of a corpus, which can be read repeatedly."""

    corpus: Corpus
    format: Format
    skip_broken: bool  # Pass over lines that are no JSON.
    trim: bool  # Take white space off both ends of every message.
    clean: CleanConfig

    def read(self, label: str, skipped: Skipped, selection: Selection) -> Iterator[tuple[Record, Content]]:
        """All of them, behind a progress bar. What is left out is told to `skipped`, duplicates to `selection`."""
        cleaner, on_broken = Cleaner(self.clean), skipped if self.skip_broken else fail
        with progress_bar(label, self.corpus.n_bytes) as bar:
            for record, found in parsed(self.corpus.records(bar.update, on_broken), self.format, skipped):
                content = self._changed(found)
                if self.clean.active and not selection.keep(record.where, cleaner(text_of(content))):
                    continue
                yield record, content

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

    fingerprint: str  # SHA-256 of all conversations.
    division: Division
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


def survey_conversations(conversations: Conversations, fraction: float) -> ConversationSurvey:
    """Reads all conversations, preferences or problems, so that errors in them appear before anything is written, and
    decides the split. Raises UserError when there are none for one of the sides."""
    sha256, sample, skipped = hashlib.sha256(), TextSample(SAMPLE_BYTES), Skipped()
    hashes, sizes = array("Q"), array("Q")  # 16 bytes a conversation, where lists take 72.
    for _, content in conversations.read("reading", skipped, Selection(conversations.clean)):
        line = line_of(content)
        sha256.update(line + b"\n")
        hashes.append(hash_of(content))
        sizes.append(len(line))
        sample.add(text_of(content).encode())
    by_prompt = conversations.format in SETS
    if len({*hashes} if by_prompt else hashes) < 2:
        why = "; those with one prompt stay together" if len(sizes) > 1 else ""
        why += f"; {skipped.lines()[0]}" if skipped.counts else ""
        noun = NOUNS[conversations.format]
        raise UserError(f"{len(sizes)} {noun} are too few for training and validation{why}")
    return ConversationSurvey(sha256.hexdigest(), divide(hashes, sizes, fraction, by_prompt), sample)


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
    skipped, selection, sha256 = Skipped(), Selection(conversations.clean), hashlib.sha256()
    counts = {name: Counter[str]() for name in SPLITS}

    def tasks() -> Iterator[tuple[tuple[SplitName, list[str]], bytes]]:
        waiting: dict[SplitName, list[bytes]] = {name: [] for name in SPLITS}
        places: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
        for number, (record, content) in enumerate(conversations.read("tokenizing", skipped, selection)):
            line = line_of(content)
            sha256.update(line + b"\n")
            name = survey.division.side(number, content)
            waiting[name].append(line)
            places[name].append(record.where)
            if sum(map(len, waiting[name])) >= TASK_BYTES:
                yield (name, places[name]), b"\n".join(waiting[name])
                waiting[name], places[name] = [], []
        yield from (((name, places[name]), b"\n".join(lines)) for name, lines in waiting.items() if lines)

    kind, vocab_size = conversations.format, tokenizer.vocab_size
    masked = kind != "problem"  # Of a problem, nothing is learnt as text.
    beside = {name: SETS[kind](folder, name) for name in SPLITS if kind in SETS}
    with (
        engine(kind, tokenizer_file) as pool,
        SplitWriter(folder, "train", vocab_size, masked) as train,
        SplitWriter(folder, "val", vocab_size, masked) as val,
    ):
        writers: dict[SplitName, SplitWriter] = {"train": train, "val": val}
        for (name, places), content in pool.encode(tasks()):
            encoded = unpacked(content, vocab_size)
            writers[name].write(encoded.tokens, encoded.ends, encoded.learnt if masked else None)
            if name in beside:
                beside[name].write(encoded)
            counts[name] += encoded.counts
            for i, reason, message in encoded.refused:
                skipped(RecordError(reason, f"{places[i]}: {message}"))
        if sha256.hexdigest() != survey.fingerprint:
            raise UserError(f"the {NOUNS[kind]} were changed while they were read; prepare them again")
        if empty := [name for name in SPLITS if not counts[name]]:
            what = {"train": "training", "val": "validation"}[empty[0]]
            raise UserError(f"no {NOUNS[kind][:-1]} is left for {what}; {'; '.join(skipped.lines())}")
        files = {name: writer.finish() for name, writer in beside.items()}
        splits = {name: writers[name].finish(counts[name]["bytes"], files.get(name, [])) for name in SPLITS}
    for text in skipped.lines():
        print(text, file=sys.stderr)
    report: dict[str, Any] = {name: dict(counts[name]) for name in SPLITS} | {"left out": dict(skipped.counts)}
    if conversations.clean.active:
        print("\n".join(selection.report.lines()), file=sys.stderr)
        report["clean"] = selection.report.to_dict()
    return splits, report
