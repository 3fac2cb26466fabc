"""What both sides learn: nanoGPT's recipe for a CPU, its text by characters, and the windows that it draws."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.presets import Preset, from_spec, small
from gpt_jax.config import OptimizerConfig

NANO = Preset(
    "learn",
    small(4, 4, 128, 64, "auto"),
    batch_size=12,
    steps=2000,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),  # And a cosine down to a tenth.
    schedule_steps=2000,
)


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's for a CPU: https://github.com/karpathy/nanoGPT#i-only-have-a-macbook, with its loss as the target."""

    preset: Preset = NANO
    eval_every: int = 250
    eval_batches: int = 20  # Of each split.
    seed: int = 1337  # Of the initial parameters and the windows.
    target: float = 1.88

    def of(self, text: "Text") -> "Recipe":
        """The recipe with the vocabulary of a text."""
        model = dataclasses.replace(self.preset.model, vocab_size=text.vocab_size)
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, model=model))

    def evaluates(self, iterations: int) -> bool:
        """Whether there is an evaluation after so many iterations; there is one before the first."""
        return iterations % self.eval_every == 0 or iterations == self.preset.schedule_steps

    def describe(self) -> str:
        """The recipe in a line."""
        p, c, adamw = self.preset, self.preset.model, self.preset.optimizer
        return (
            f"{c.n_layer} layers, {c.n_head} heads, width {c.d_model}, context {c.context_length}, "
            f"batch {p.batch_size}, no biases, no dropout; AdamW, learning rate {adamw.learning_rate:g} and a cosine "
            f"to a tenth over {p.schedule_steps} iterations, {adamw.warmup_steps} of warm-up, beta2 {adamw.beta2:g}, "
            f"weight decay {adamw.weight_decay:g}, clipped at {adamw.clip_norm:g}; every {self.eval_every} iterations, "
            f"{self.eval_batches} batches of each split are evaluated"
        )


def recipe_from(spec: dict[str, Any]) -> Recipe:
    """The recipe of which `spec` are the fields, as JSON has them."""
    return Recipe(**{**spec, "preset": from_spec(spec["preset"])})


class Text(NamedTuple):
    """A text by characters: int32 arrays of the first nine tenths and of the rest."""

    train: np.ndarray
    val: np.ndarray
    vocab_size: int


class Windows:
    """The windows of a recipe, the same for all contestants: int32 (B, T + 1) a batch."""

    def __init__(self, context_length: int, text: Text, draws: str) -> None:
        """draws: the file of windows that `nanogpt.Draws` wrote."""
        self.context_length, self.text = context_length, text
        with np.load(draws) as file:
            self.starts = dict(file)

    def train(self, iteration: int) -> np.ndarray:
        """The batch of an iteration, counted from 0."""
        return self.cut(self.text.train, self.starts["train"][iteration])

    def evaluation(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The batches of both splits, training and validation, of an evaluation, counted from 0."""
        train, val = (self.starts[name][number] for name in ("train_eval", "val_eval"))
        return [self.cut(self.text.train, at) for at in train], [self.cut(self.text.val, at) for at in val]

    def cut(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Windows of a split, and the token after each."""
        return tokens[starts[:, None] + np.arange(self.context_length + 1)]


def read_text(path: str) -> Text:
    """The text of a UTF-8 file; its characters in their order are the vocabulary."""
    characters = np.frombuffer(Path(path).read_text(encoding="utf-8").encode("utf-32-le"), np.uint32)
    vocabulary = np.flatnonzero(np.bincount(characters))
    ids = np.zeros(vocabulary[-1] + 1, np.int32)
    ids[vocabulary] = np.arange(len(vocabulary))
    train, val = np.split(ids[characters], [int(0.9 * len(characters))])
    return Text(train, val, len(vocabulary))


def whole_val(preset: Preset, text: Text) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of the validation text in order: tokens (B, T + 1) and mask of the real targets (B, T), bool."""
    B, T = preset.batch_size, preset.model.context_length
    n_targets = len(text.val) - 1
    n_batches = -(-n_targets // (B * T))
    padded = np.resize(text.val, n_batches * B * T + 1)
    for first in range(0, n_batches * B * T, B * T):
        starts = first + np.arange(B)[:, None] * T
        yield padded[starts + np.arange(T + 1)], starts + np.arange(T) < n_targets
