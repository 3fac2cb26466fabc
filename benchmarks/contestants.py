"""What a contestant does, whichever its library is: `ours` and `theirs` say how, with gpt_jax and with PyTorch."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.measure import seconds_of
from benchmarks.presets import Preset, random_tokens
from benchmarks.recipe import Windows, read_text, recipe_from, whole_val

Arrays = dict[str, np.ndarray]
"""Parameters, or their gradients, by their path in gpt_jax's tree: "layers/mlp/up/kernel" (L, D, F)."""


def read_arrays(path: str) -> Arrays:
    """The arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)


def prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random prompts, int32 (B, T); the same for all contestants."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int32)


class Contestant:
    """A library with a model, and the memory that it needs. A subclass has the methods that are declared here."""

    libraries: int  # Bytes of the process with its libraries and devices, before there was any array.
    peak_bytes: Any  # () -> int: most memory that was in use so far.
    state_and_temporaries: Any
    """(**case) -> dict: bytes on all devices, "state", of the weights and of what the optimizer or the cache holds; and
    where the library says so, "temporaries", what the program needs besides. case: what is decoded."""

    def memory(self, **case: int) -> dict[str, int]:
        """Bytes by kind. To be called when the work was done once."""
        return {"libraries": self.libraries, **self.state_and_temporaries(**case)}


class Training(Contestant):
    """Trains a preset. A subclass has the methods that are declared here."""

    preset: Preset
    start: Any  # () -> None: starts anew, with the initial parameters; what is compiled stays.
    how: Any  # () -> dict: the options that matter.
    put: Any  # (tokens) -> tokens: a batch, int32 (B, T + 1), on the devices.
    train: Any  # (tokens) -> loss, on its way: an optimizer step on a batch that is on the devices.
    wait: Any  # () -> None: returns when all steps are done.
    gradients: Any  # (tokens) -> Arrays: those of the initial parameters on a batch, by their paths.
    mean_loss: Any  # (batches) -> float: nats a token, of batches, int32 (B, T + 1), each with its mask (B, T), bool.

    def numbered(self, number: int) -> Any:
        """A batch of random tokens, on the devices."""
        return self.put(random_tokens(self.preset, number))

    def batches(self, windows: Windows, steps: int) -> Iterator[Any]:
        """The batches of a recipe's iterations, on the devices."""
        return (self.put(windows.train(iteration)) for iteration in range(steps))

    def write_gradients(self, path: str, batch: int) -> None:
        """Writes the gradients of the initial parameters on a batch to an .npz file."""
        np.savez(path, **self.gradients(self.numbered(batch)))

    def losses(self, batch: int, count: int) -> list[float]:
        """The losses of so many steps on one and the same batch, which is learned by heart."""
        return [float(self.train(self.numbered(batch))) for _ in range(count)]

    def seconds(self, first: int, count: int) -> float:
        """Seconds a step of so many, from the first one's tokens on the host to the last one's state on the device."""
        begin = time.perf_counter()
        for number in range(first, first + count):
            self.train(self.numbered(number))
        self.wait()
        return (time.perf_counter() - begin) / count

    def learn(self, recipe: dict[str, Any], path: str, draws: str, begun: float) -> dict[str, Any]:
        """Follows a recipe on a text: the fields of `learn.Run`.

        draws: the file of windows; begun: when the process was started, on the clock time.monotonic(), which all
        processes share.
        """
        r, text, context_length = recipe_from(recipe), read_text(path), self.preset.model.context_length
        windows = Windows(context_length, text, draws)
        everything_BT = np.ones((self.preset.batch_size, context_length), bool)
        curve: list[tuple[float, int, int, float]] = []

        def evaluate(iterations: int) -> None:
            _, val_loss = (  # nanoGPT estimates the loss of the training split, too.
                self.mean_loss((tokens, everything_BT) for tokens in split) for split in windows.evaluation(len(curve))
            )
            curve.append((time.monotonic() - begun, iterations, iterations * self.preset.tokens_per_step, val_loss))

        evaluate(0)
        for iterations, tokens in enumerate(self.batches(windows, self.preset.schedule_steps), 1):
            self.train(tokens)
            if r.evaluates(iterations):
                evaluate(iterations)
        found = {"curve": curve, "peak_bytes": self.peak_bytes(), "memory": self.memory()}
        return {**found, "whole_val_loss": self.mean_loss(whole_val(self.preset, text))}


class Decoding(Contestant):
    """Answers prompts. A subclass has the methods that are declared here."""

    answer: Any  # (batch, prompt, new, top_k) -> new tokens (B, new) on the host; top_k: of so many, or 0: the best.
    logprobs: Any  # (batch, prompt, new) -> log-probabilities in nats (B, new) of the tokens of a greedy answer.

    def greedy(self, **case: int) -> dict[str, Any]:
        """The most probable tokens and their log-probabilities, as lists."""
        return {"tokens": self.answer(**case, top_k=0).tolist(), "logprobs": self.logprobs(**case).tolist()}

    def seconds(self, **case: int) -> float:
        """Seconds of an answer, from the prompts to the tokens on the host."""
        return seconds_of(lambda: self.answer(**case))
