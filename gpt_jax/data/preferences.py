"""Preferences as tokens: a prompt and two answers to it, a better and a worse one, in files and in batches.

In a data folder, a document is a prompt, the chosen answer and the rejected one, each as sampling after that prompt
would make it. `train-lengths.bin` and `val-lengths.bin` have the numbers of their tokens, three uint32, little endian,
for each pair.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.data.conversations import Example, count_answers, examples
from gpt_jax.data.encoded import Document, Encoded
from gpt_jax.data.loader import draw, samples_of
from gpt_jax.data.records import RecordError
from gpt_jax.data.shards import SPLITS, Dataset, Meta, SplitName, map_file
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import Chat
from gpt_jax.tokenizer.tokenizer import Tokenizer

ANSWERS = ("chosen", "rejected")


def documents(tokenizer: Tokenizer, chat: Chat, record: Mapping[str, Any]) -> tuple[list[Document], Counter[str]]:
    """The document of a preference, and what it counts. The prompt's tokens are those of `Tokenizer.encode_chat`, and
    of the answers exactly that is learnt which the model has to write itself; see `conversations.examples`.

    Raises RecordError when the prompt is not what an answer goes on with, token by token, and when both answers are the
    same tokens.
    """
    messages = [{**message, "train": False} for message in record["prompt"]]
    try:
        prompt = chat.prompt(messages, record["tools"])
    except UserError as e:
        raise RecordError("a template refuses it", str(e)) from e
    chosen, rejected = (_sequence(tokenizer, chat, prompt, messages, record, name) for name in ANSWERS)
    if chosen.tokens == rejected.tokens:
        raise RecordError("chosen equals rejected", "chosen and rejected become the same tokens")
    n = len(prompt)
    tokens = chosen.tokens + rejected.tokens[n:]
    lengths = (n, len(chosen.tokens) - n, len(rejected.tokens) - n)
    counts = Counter(preferences=1) + count_answers(tokenizer, [chosen, rejected])
    return [Document(tokens, chosen.learnt + rejected.learnt[n:], lengths)], counts


def _sequence(
    tokenizer: Tokenizer,
    chat: Chat,
    prompt: list[int],
    messages: list[dict[str, Any]],
    record: Mapping[str, Any],
    name: str,
) -> Example:
    """The prompt and one of the answers. Raises RecordError."""
    try:
        made = examples(tokenizer, [*messages, *record[name]], record["tools"], chat)
    except RecordError as e:
        raise RecordError(e.reason, f"{name}: {e}") from e
    if len(made) > 1:
        reason = "the template rewrites an answer that goes on"
        raise RecordError(reason, f"{name}: {reason}, so no sequence has all of it")
    if made[0].tokens[: len(prompt)] != prompt:
        reason = "the template rewrites a prompt that is answered"
        raise RecordError(reason, f"{name}: {reason}")
    return made[0]


def _lengths_file(name: SplitName) -> str:
    return f"{name}-lengths.bin"


class LengthsWriter:
    """Writes the lengths of a split."""

    def __init__(self, folder: Path, name: SplitName) -> None:
        self._file = folder / _lengths_file(name)
        self._lengths: list[np.ndarray] = []

    def write(self, encoded: Encoded) -> None:
        """Appends those of more documents."""
        self._lengths.append(encoded.lengths.ravel())

    def finish(self) -> list[Path]:
        """The files, complete."""
        self._file.write_bytes(np.concatenate(self._lengths).astype("<u4").tobytes())
        return [self._file]


class Pair(NamedTuple):
    """A prompt of P tokens and answers of C and R tokens: the ids, int32, and which of them are to be learnt, bool."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,)
    rejected: np.ndarray  # (R,)
    chosen_learnt: np.ndarray  # (C,)
    rejected_learnt: np.ndarray  # (R,)


class Pairs(Protocol):
    """Pairs with random access."""

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each prompt, chosen and rejected answer, int64 (pairs, 3)."""

    def pair(self, index: int) -> Pair:
        """One of them. Raises IndexError outside of 0 to pairs - 1."""


class PreferenceFiles:
    """The pairs of one split of a data folder."""

    def __init__(self, data: Dataset, name: SplitName) -> None:
        """Raises UserError when the folder is no preference set, or a file of it is missing or does not fit."""
        data.check_format("dpo")
        self._tokens = data.split(name)
        starts = self._tokens.document_starts.astype(np.int64)
        self._starts, path = starts.tolist(), data.folder / _lengths_file(name)
        flat = map_file(path, np.dtype("<u4"), 3 * len(starts))[:]
        self.lengths = flat.reshape(-1, 3).astype(np.int64)
        if not np.array_equal(self.lengths.sum(axis=1), np.diff(starts, append=len(self._tokens))):
            raise UserError(f"{path} does not fit the tokens beside it; prepare the data again")
        data.check_unchanged()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._starts)

    def pair(self, index: int) -> Pair:
        """See Pairs."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        start, (prompt, chosen, rejected) = self._starts[index], self.lengths[index].tolist()
        borders, size = (prompt, prompt + chosen), prompt + chosen + rejected
        _, *learnt = np.split(self._tokens.read_learnt(start, size), borders)
        return Pair(*np.split(self._tokens.read(start, size), borders), *learnt)


class PairCounts(NamedTuple):
    """What fitting pairs into rows did."""

    pairs: int
    dropped: int  # Pairs with a prompt and an answer that are together longer than a row.
    lost: int  # Tokens of these, prompts counted once.
    fill: float  # The share of the rows' places that hold a token.


@dataclass(frozen=True)
class PairRows:
    """Two rows of T + 1 tokens for each pair that fits, the prompt and the chosen answer, the prompt and the rejected
    one. Nothing is cut: pairs that are longer are dropped."""

    pairs: Pairs
    context_length: int

    @functools.cached_property
    def _fits(self) -> np.ndarray:
        prompt, chosen, rejected = self.pairs.lengths.T
        fits: np.ndarray = prompt + np.maximum(chosen, rejected) <= self.context_length + 1
        return fits

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """The numbers of the pairs that fit, ascending, int64 (pairs that fit,)."""
        return np.flatnonzero(self._fits)

    @property
    def counts(self) -> PairCounts:
        """See PairCounts."""
        lengths, fits = self.pairs.lengths, self._fits
        used, places = lengths[fits] @ (2, 1, 1), 2 * len(self) * (self.context_length + 1)
        return PairCounts(len(fits), len(fits) - len(self), int(lengths[~fits].sum()), int(used.sum()) / max(places, 1))

    def __len__(self) -> int:
        """Number of pairs that fit."""
        return len(self.numbers)

    @functools.cached_property
    def longest(self) -> np.ndarray:
        """The tokens of the longer row of each pair that fits, int64 (pairs that fit,)."""
        prompt, chosen, rejected = self.pairs.lengths[self.numbers].T
        longest: np.ndarray = prompt + np.maximum(chosen, rejected)
        return longest

    def row(self, index: int, size: int | None = None) -> Batch:
        """Both rows of a pair that fits: a batch of two rows, (2, T + 1) tokens, chosen first. Padding is token 0, no
        target, and a segment of its own. size: T, if it is less than the context length."""
        prompt, *answers = self.pairs.pair(int(self.numbers[index]))
        shape = (2, (size or self.context_length) + 1)
        tokens, learnt, segments = np.zeros(shape, np.int32), np.zeros(shape, bool), np.ones(shape, np.int32)
        positions = np.tile(np.arange(shape[1], dtype=np.int32), (2, 1))
        for i, (answer, mask) in enumerate(zip(answers[:2], answers[2:], strict=True)):
            start, end = len(prompt), len(prompt) + len(answer)
            tokens[i, :end] = np.concatenate((prompt, answer))
            learnt[i, start:end] = mask
            segments[i, :end] = 0
            positions[i, end:] -= end
        return Batch(tokens, learnt[:, 1:], segments[:, :-1], positions[:, :-1])


@dataclass(frozen=True)
class PreferenceBatches:
    """The batches of a training run on pairs: `batches(step)` has B of them, with an axis for the answers after that of
    the pairs, tokens (B, 2, T + 1), chosen first, so that no microbatch and no device parts a pair.

    `batches(step, rows)` has only the given pairs of that batch, those of one host. Each epoch has every pair that fits
    once. Raises UserError when none does.

    sizes: values of T, ascending, the last of which is the context length; a batch has the first that all of its pairs
    fit into. Empty: the context length.
    """

    rows: PairRows
    batch_size: int
    seed: int
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise UserError(
                f"none of {self.rows.counts.pairs:,} training pairs fits into model.context_length + 1 = "
                f"{self.rows.context_length + 1} tokens; use a longer context"
            )

    def __call__(self, step: int, rows: np.ndarray | None = None) -> Batch:
        size = fitting_size(self.sizes, self.rows.longest[self.drawn(step)])  # The same on all hosts.
        return _stack([self.rows.row(i, size) for i in self.drawn(step, rows)])

    def drawn(self, step: int, rows: np.ndarray | None = None) -> list[int]:
        """Which of the pairs that fit each pair of a batch, or of its given ones, is."""
        return [i for i, _ in draw(len(self.rows), samples_of(step, self.batch_size, rows), self.seed)]


@dataclass(frozen=True, eq=False)
class PairFolder:
    """The preference set that a run is trained on, open for reading. Raises UserError when it is none."""

    data: Dataset

    def __post_init__(self) -> None:
        self.data.check_format("dpo")

    @property
    def tokenizer(self) -> Tokenizer:
        """Theirs, with its chat template."""
        return self.data.tokenizer

    @property
    def metas(self) -> list[Meta]:
        """The content of its meta.json."""
        return [self.data.meta]

    @functools.cache  # noqa: B019
    def rows(self, split: SplitName, context_length: int) -> PairRows:
        """The rows of a split."""
        return PairRows(PreferenceFiles(self.data, split), context_length)

    def describe(self, context_length: int) -> list[str]:
        """A line for each split: its pairs, and how they fit."""
        lines = []
        for split in SPLITS:
            counts = self.rows(split, context_length).counts
            line = f"{self.data.folder}, {split}: {counts.pairs - counts.dropped:,} pairs, {counts.fill:.1%} full"
            lines.append(line + f", {counts.dropped:,} dropped ({counts.lost:,} tokens)" * bool(counts.dropped))
        return lines


def preference_eval_batches(
    rows: PairRows, batch_size: int, sizes: tuple[int, ...] = ()
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All pairs that fit, shortest first, as `PreferenceBatches` has them, and which ones they are, int64 (pairs,).
    Pairs without a target fill up the last batch."""
    order = np.argsort(rows.longest, kind="stable")
    for first in range(0, len(rows), batch_size):
        numbers = order[first : first + batch_size]
        size = fitting_size(sizes, rows.longest[numbers]) or rows.context_length
        row = np.zeros((2, size), np.int32)
        positions = row + np.arange(size, dtype=np.int32)
        filler = Batch(np.zeros((2, size + 1), np.int32), row.astype(bool), row, positions)
        found = [rows.row(index, size) for index in numbers.tolist()]
        yield numbers, _stack([*found, *[filler] * (batch_size - len(found))])


def fitting_size(sizes: Sequence[int], lengths: np.ndarray) -> int | None:
    """The first size T with which rows of T + 1 hold sequences of these lengths; None when there is none."""
    return next((size for size in sizes if size + 1 >= lengths.max()), None)


def _stack(pairs: list[Batch]) -> Batch:
    fields = ("tokens", "mask", "segments", "positions")
    return Batch(*(np.stack([getattr(pair, name) for pair in pairs]) for name in fields))
