"""What both sides learn: nanoGPT's recipe for a CPU, its text by characters, and the windows that it draws."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.presets import Preset, small
from gpt_jax.config import OptimizerConfig

ADAMW = OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99)  # And a cosine down to a tenth.
NANO = Preset("learn", small(4, 4, 128, 64, "auto"), 12, 2000, optimizer=ADAMW, schedule_steps=2000)


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's for a CPU: https://github.com/karpathy/nanoGPT#i-only-have-a-macbook, with its loss as the target."""

    preset: Preset = NANO
    eval_every: int = 250
    eval_batches: int = 20  # Of each split.
    seed: int = 1337  # Of the initial parameters and the windows.
    target: float = 1.88
    own_arguments: tuple[str, ...] = ("configs/shakespeare_char_cpu.py", "--train.eval-every=250")
    """Of `gpt_jax train`, for its own recipe."""

    def of(self, text: "Text") -> "Recipe":
        """The recipe with the vocabulary of a text."""
        model = replace(self.preset.model, vocab_size=text.vocab_size)
        return replace(self, preset=replace(self.preset, model=model))

    def evaluates(self, iterations: int) -> bool:
        """Whether there is an evaluation after so many iterations; there is one before the first."""
        return iterations % self.eval_every == 0 or iterations == self.preset.schedule_steps

    def describe(self) -> str:
        """The recipe in a line."""
        p, adamw = self.preset, self.preset.optimizer
        return (
            f"{p.describe()}, no biases, no dropout; AdamW, learning rate {adamw.learning_rate:g} and a cosine to a "
            f"tenth over {p.schedule_steps} iterations, {adamw.warmup_steps} of warm-up, beta2 {adamw.beta2:g}, weight "
            f"decay {adamw.weight_decay:g}, clipped at {adamw.clip_norm:g}; every {self.eval_every} iterations, "
            f"{self.eval_batches} batches of each split are evaluated"
        )


class Text(NamedTuple):
    """A text by characters: int32 arrays of the first nine tenths and of the rest."""

    train: np.ndarray
    val: np.ndarray
    vocab_size: int


def windows(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> np.ndarray:
    """The windows of a split that begin at `starts` (B,), and the token after each: int32 (B, T + 1)."""
    return tokens[starts[:, None] + np.arange(context_length + 1)]


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
