"""Preferences as tokens: a prompt and two answers to it, a better and a worse one, in files and in batches.

In a data folder, a document is a prompt, the chosen answer and the rejected one, each as sampling after that prompt
would make it. `train-lengths.bin` and `val-lengths.bin` have the numbers of their tokens, three uint32, little endian,
for each pair.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt_jax.data.batch import Batch
from gpt_jax.data.conversations import Example, count_answers, examples
from gpt_jax.data.encoded import Document, Encoded
from gpt_jax.data.loader import draw, samples_of
from gpt_jax.data.records import RecordError
from gpt_jax.data.shards import Dataset, SplitName, map_file
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

    def row(self, index: int) -> Batch:
        """Both rows of a pair that fits: a batch of two rows, (2, T + 1) tokens, chosen first. Padding is token 0, no
        target, and a segment of its own."""
        prompt, *answers = self.pairs.pair(int(self.numbers[index]))
        shape = (2, self.context_length + 1)
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
    the pairs, tokens (B, 2, T + 1), so that no microbatch and no device parts a pair; see `chosen_first`.

    `batches(step, rows)` has only the given pairs of that batch, those of one host. Each epoch has every pair that fits
    once. Raises UserError when none does.
    """

    rows: PairRows
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise UserError(
                f"none of {self.rows.counts.pairs:,} training pairs fits into model.context_length + 1 = "
                f"{self.rows.context_length + 1} tokens; use a longer context"
            )

    def __call__(self, step: int, rows: np.ndarray | None = None) -> Batch:
        drawn = draw(len(self.rows), samples_of(step, self.batch_size, rows), self.seed)
        return _stack([self.rows.row(i) for i, _ in drawn])


def preference_eval_batches(rows: PairRows, batch_size: int) -> Iterator[Batch]:
    """All pairs that fit in order, as `PreferenceBatches` has them. Pairs without a target fill up the last batch."""
    T = rows.context_length
    row = np.zeros((2, T), np.int32)
    filler = Batch(np.zeros((2, T + 1), np.int32), row.astype(bool), row, row + np.arange(T, dtype=np.int32))
    for first in range(0, len(rows), batch_size):
        found = [rows.row(index) for index in range(first, min(first + batch_size, len(rows)))]
        yield _stack([*found, *[filler] * (batch_size - len(found))])


def chosen_first(batch: Batch) -> Batch:
    """The 2B rows of a batch of B pairs, tokens (2B, T + 1), for the model: the chosen ones, then the rejected ones in
    the same order. NumPy or JAX arrays."""
    return Batch(*(x.swapaxes(0, 1).reshape(-1, x.shape[-1]) for x in batch))


def _stack(pairs: list[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*pairs, strict=True)))
