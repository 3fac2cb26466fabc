"""Conversations to a data folder: their tokens, and which of them are to be learnt."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.config import CleanConfig
from gpt_jax.data.clean import Cleaner, Selection, normalized
from gpt_jax.data.conversations import unpacked
from gpt_jax.data.messages import Conversation, Format, parsed
from gpt_jax.data.pool import WorkerPool
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.records import Record, RecordError, Skipped, fail
from gpt_jax.data.shards import SPLITS, Split, SplitName, SplitWriter
from gpt_jax.data.sources import Corpus
from gpt_jax.data.train_tokenizer import SAMPLE_BYTES, TextSample
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

TASK_BYTES = 1 << 18  # Conversations, as JSON, that a worker tokenises at one time.


@dataclass
class Conversations:
    """The conversations of a corpus, which can be read repeatedly."""

    corpus: Corpus
    format: Format
    skip_broken: bool  # Pass over lines that are no JSON.
    trim: bool  # Take white space off both ends of every message.
    clean: CleanConfig

    def read(self, label: str, skipped: Skipped, selection: Selection) -> Iterator[tuple[Record, Conversation]]:
        """All of them, behind a progress bar. What is left out is told to `skipped`, duplicates to `selection`."""
        cleaner, on_broken = Cleaner(self.clean), skipped if self.skip_broken else fail
        with progress_bar(label, self.corpus.n_bytes) as bar:
            for record, found in parsed(self.corpus.records(bar.update, on_broken), self.format, skipped):
                assert isinstance(found, Conversation)
                conversation = self._changed(found)
                if self.clean.active:
                    verdict = cleaner("\n".join(message["content"] for message in conversation.messages))
                    if not selection.keep(record.where, verdict):
                        continue
                yield record, conversation

    def _changed(self, conversation: Conversation) -> Conversation:
        """The conversation with the contents that `trim` and `clean` ask for."""
        if not self.trim and self.clean.normalize == "none":
            return conversation

        def changed(content: str) -> str:
            return normalized(content.strip() if self.trim else content, self.clean)

        messages = tuple({**m, "content": changed(m["content"])} for m in conversation.messages)
        return conversation._replace(messages=messages)


class ConversationSurvey(NamedTuple):
    """The results of reading conversations once."""

    fingerprint: str  # SHA-256 of all conversations.
    fraction: float  # For validation.
    first_val: int | None  # Number of the first conversation for validation; None: their hashes decide.
    sample: TextSample  # Of what they say.


def line_of(conversation: Conversation) -> bytes:
    """A conversation as JSON, in one line, the same for the same conversation."""
    fields = {"messages": conversation.messages, "tools": conversation.tools}
    return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


def is_for_validation(line: bytes, fraction: float) -> bool:
    """True for a fraction of all conversations, by their hash, so that copies are in the same split."""
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") < fraction * 2**64


def survey_conversations(conversations: Conversations, fraction: float) -> ConversationSurvey:
    """Reads all conversations, so that errors in them appear before anything is written, and decides the split.

    It is by hash, unless that misses the fraction by more than half of the smaller side, as it does with few
    conversations; then the last ones are for validation. Raises UserError when there are fewer than two.
    """
    sha256, sample, skipped, sizes = hashlib.sha256(), TextSample(SAMPLE_BYTES), Skipped(), list[int]()
    val_bytes = 0
    for _, conversation in conversations.read("reading", skipped, Selection(conversations.clean)):
        line = line_of(conversation)
        sha256.update(line + b"\n")
        sizes.append(len(line))
        val_bytes += len(line) * is_for_validation(line, fraction)
        sample.add("\n".join(message["content"] for message in conversation.messages).encode())
    if len(sizes) < 2:
        why = f"; {skipped.lines()[0]}" if skipped.counts else ""
        raise UserError(f"{len(sizes)} conversations are too few for training and validation{why}")
    total, first_val = sum(sizes), None
    if abs(val_bytes / total - fraction) > min(fraction, 1 - fraction) / 2:
        starts = np.cumsum(sizes) - sizes
        first_val = min(max(1, int(np.searchsorted(starts, (1 - fraction) * total))), len(sizes) - 1)
    return ConversationSurvey(sha256.hexdigest(), fraction, first_val, sample)


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
    n_workers: int,
) -> tuple[dict[SplitName, Split], dict[str, Any]]:
    """Tokenises conversations into `folder`. Returns the splits, and counts for meta.json. Says on stderr what was left
    out.

    Raises UserError when nothing is left for one of the splits.
    """
    skipped, selection, sha256 = Skipped(), Selection(conversations.clean), hashlib.sha256()
    counts = {name: Counter[str]() for name in SPLITS}

    def tasks() -> Iterator[tuple[tuple[SplitName, list[str]], bytes]]:
        waiting: dict[SplitName, list[bytes]] = {name: [] for name in SPLITS}
        places: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
        for number, (record, conversation) in enumerate(conversations.read("tokenizing", skipped, selection)):
            line = line_of(conversation)
            sha256.update(line + b"\n")
            by_hash = survey.first_val is None
            val = is_for_validation(line, survey.fraction) if by_hash else number >= (survey.first_val or 0)
            name: SplitName = "val" if val else "train"
            waiting[name].append(line)
            places[name].append(record.where)
            if sum(map(len, waiting[name])) >= TASK_BYTES:
                yield (name, places[name]), b"\n".join(waiting[name])
                waiting[name], places[name] = [], []
        yield from (((name, places[name]), b"\n".join(lines)) for name, lines in waiting.items() if lines)

    vocab_size = tokenizer.vocab_size
    with (
        WorkerPool("chat", str(tokenizer_file), n_workers) as pool,
        SplitWriter(folder, "train", vocab_size, masked=True) as train,
        SplitWriter(folder, "val", vocab_size, masked=True) as val,
    ):
        writers: dict[SplitName, SplitWriter] = {"train": train, "val": val}
        for (name, places), content in pool.encode(tasks()):
            encoded = unpacked(content, vocab_size)
            writers[name].write(encoded.tokens, encoded.ends, encoded.learnt)
            counts[name] += encoded.counts
            for i, reason, message in encoded.refused:
                skipped(RecordError(reason, f"{places[i]}: {message}"))
        if sha256.hexdigest() != survey.fingerprint:
            raise UserError("the conversations were changed while they were read; prepare them again")
        if empty := [name for name in SPLITS if not counts[name]["examples"]]:
            what = {"train": "training", "val": "validation"}[empty[0]]
            raise UserError(f"no conversation is left for {what}; {'; '.join(skipped.lines()) or 'give more of them'}")
        splits = {name: writer.finish(counts[name]["bytes"]) for name, writer in writers.items()}
    for text in skipped.lines():
        print(text, file=sys.stderr)
    report: dict[str, Any] = {name: dict(counts[name]) for name in SPLITS} | {"left out": dict(skipped.counts)}
    if conversations.clean.active:
        print("\n".join(selection.report.lines()), file=sys.stderr)
        report["clean"] = selection.report.to_dict()
    return splits, report
