"""What a contestant does, whichever its library is: `ours` and `theirs` say how, with gpt_jax and with PyTorch."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import forget_peak, seconds_of
from benchmarks.presets import Preset, random_tokens
from benchmarks.recipe import Recipe, read_text, whole_val, windows

MODES = {"greedy": 0, "top_50": 50}
"""How an answer's tokens are chosen: the most probable ones, or drawn from so many."""

Asked = Sequence[tuple[list[int], int]]
"""Requests: the tokens of each prompt, and how many its answer has."""

Conversations = Sequence[tuple[np.ndarray, np.ndarray]]
"""The tokens of each, int32 (n,), and which of them are to be learnt, bool (n,)."""

Arrays = dict[str, np.ndarray]
"""Parameters, or their gradients, by their path in gpt_jax's tree: "layers/mlp/up/kernel" (L, D, F)."""


def prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random prompts, int32 (B, T); the same for all contestants."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int32)


class Tuned(NamedTuple):
    """Seconds of training, and what was trained on then."""

    seconds: float
    learnt: int  # Targets that count.
    text: int  # Places that hold a token of a conversation.
    places: int  # Those of all rows, padding included.


class Contestant:
    """A library with a model. A subclass has the methods that are declared here."""

    memory: Any
    """(**case) -> dict, asked when the work was done once: "peak_bytes", the most that was in use so far, and "memory",
    bytes by kind: "libraries", of the process when there were libraries and devices, and no arrays; "state", on all
    devices, of the weights and of what the optimizer or the cache holds; and where the library says so, "temporaries",
    what the program needs besides. case: what is decoded."""


class Training(Contestant):
    """Trains a preset. A subclass has the methods that are declared here."""

    preset: Preset
    start: Any  # (parameters) -> None: starts anew, from these Arrays; what is compiled stays.
    how: Any  # () -> dict: the options that matter.
    put: Any  # (tokens) -> tokens: a batch, int32 (B, T + 1), on the devices.
    train: Any  # (tokens) -> loss, on its way: an optimizer step on a batch that is on the devices.
    wait: Any  # () -> None: returns when all steps are done.
    gradients: Any  # (parameters, tokens) -> Arrays: those of a batch that is on the devices, at these parameters.
    mean_loss: Any  # (batches) -> float: nats a token, of batches, int32 (B, T + 1), each with its mask (B, T), bool.

    def numbered(self, number: int) -> Any:
        """A batch of random tokens, on the devices."""
        return self.put(random_tokens(self.preset, number))

    def compute(self, parameters: Arrays, steps: int) -> tuple[Arrays, list[float]]:
        """The gradients of the first batch, and the losses of so many steps on it; starts anew before and after."""
        gradients = self.gradients(parameters, self.numbered(0))
        self.start(parameters)
        losses = [float(self.train(self.numbered(0))) for _ in range(steps)]
        self.start(parameters)
        return gradients, losses

    def seconds(self, first: int, count: int) -> float:
        """Seconds a step of so many, from the first one's tokens on the host to the last one's state on the device."""
        begin = time.perf_counter()
        for number in range(first, first + count):
            self.train(self.numbered(number))
        self.wait()
        return (time.perf_counter() - begin) / count

    def learn(self, recipe: Recipe, path: str, parameters: Arrays, starts: Arrays, begun: float) -> tuple[Any, ...]:
        """Follows a recipe on a text: the fields of `learn.Run` after the first.

        starts: those of the windows, as `nanogpt.Draws` draws them; begun: when the process was started, on the clock
        time.monotonic(), which all processes share.
        """
        self.start(parameters)
        text, context_length = read_text(path), self.preset.model.context_length
        everything_BT = np.ones((self.preset.batch_size, context_length), bool)
        curve: list[tuple[float, int, int, float]] = []

        def evaluate(iterations: int) -> None:
            _, val_loss = (  # nanoGPT estimates the loss of the training split, too.
                self.mean_loss((windows(split, at, context_length), everything_BT) for at in starts[name][len(curve)])
                for split, name in ((text.train, "train_eval"), (text.val, "val_eval"))
            )
            curve.append((time.monotonic() - begun, iterations, iterations * self.preset.tokens_per_step, val_loss))

        evaluate(0)
        for iteration in range(self.preset.schedule_steps):
            self.train(self.put(windows(text.train, starts["train"][iteration], context_length)))
            if recipe.evaluates(iteration + 1):
                evaluate(iteration + 1)
        memory = self.memory()
        return curve, self.mean_loss(whole_val(self.preset, text)), memory


class Decoding(Contestant):
    """Answers prompts. A subclass has the methods that are declared here."""

    ready: Any  # (parameters) -> None: takes these Arrays.
    answer: Any  # (batch, prompt, new, top_k) -> new tokens (B, new) on the host; top_k: of so many, or 0: the best.
    greedy: Any  # (batch, prompt, new) -> the most probable tokens (B, new), and their log-probabilities in nats.

    serve: Any  # (asked, slots) -> seconds until all is answered greedily, so many at a time; the answers' tokens.

    modes: Sequence[str] = tuple(MODES)

    def begin(self) -> None:
        """Gives back what only loading took, and lets the peak begin anew."""
        forget_peak()

    def greedy_seconds(self, batch: int, prompt: int, new: int) -> float:
        """Seconds of a greedy answer, from the prompts to the tokens on the host."""
        return seconds_of(partial(self.answer, batch, prompt, new, MODES["greedy"]))

    def seconds(self, batch: int, prompt: int, new: int) -> dict[str, tuple[float, float]]:
        """By mode, the seconds of an answer of one token and of all, from the prompts to the tokens on the host."""
        answer = partial(self.answer, batch, prompt)
        return {
            mode: (seconds_of(partial(answer, 1, MODES[mode])), seconds_of(partial(answer, new, MODES[mode])))
            for mode in self.modes
        }
