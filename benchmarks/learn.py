"""Learning, everything included: python -m benchmarks learn

Wall time from the start of the process to the first evaluation at which the loss is down to the target, on tiny
Shakespeare by characters. Imports, reading the text, compiling, training and evaluating all count, so each contestant
is a process started anew for each round, with nothing compiled before. gpt_jax and PyTorch follow one recipe, from the
same initial parameters on the same windows; besides, there is the command of gpt_jax with its own recipe.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import Results, Row, ratios, spread
from benchmarks.worker import (
    ENVIRONMENT,
    ROOT,
    FailedError,
    Worker,
    limit_seconds,
    peak_memory,
    take_turns,
    too_late,
)
from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.errors import UserError

NAME = "learn/shakespeare-char"
OURS, OWN_RECIPE = "gpt_jax", "gpt_jax, own recipe"
PYTORCH = ("pytorch, eager", "pytorch, compiled")
OWN_ARGUMENTS = ("configs/shakespeare_char_cpu.py", "--train.eval-every=250")
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

TOLERANCES = {"initial": 2e-3, "first": 2e-2}
"""Of the loss, relative: before the first iteration, and at the first evaluation after it."""

NOTES = [
    "both sides have the initial parameters and the windows that nanoGPT draws with its seed, its estimates of the "
    f"loss included; the loss of {OWN_RECIPE!r} is of the whole validation set, at another learning rate",
    "GELU is the tanh form on both sides, where nanoGPT has the exact one",
    "the loss aimed at is the one that nanoGPT's README tells of, to two decimals",
    "s in all is the time to the last evaluation; the loss at the end is that of the whole validation set, computed "
    "after it",
]


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's for a CPU: https://github.com/karpathy/nanoGPT#i-only-have-a-macbook, with its loss as the target."""

    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    context_length: int = 64
    batch_size: int = 12
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    steps: int = 2000
    eval_every: int = 250
    eval_batches: int = 20  # Of each split.
    seed: int = 1337  # Of the initial parameters and the windows.
    target: float = 1.88

    def model(self, vocab_size: int) -> ModelConfig:
        """The model, in float32 on CPU and bfloat16 elsewhere."""
        return ModelConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            n_layer=self.n_layer,
            n_head=self.n_head,
            d_model=self.d_model,
            bias=False,
        )

    def optimizer(self) -> OptimizerConfig:
        """AdamW, its learning rate a cosine down to a tenth."""
        return OptimizerConfig(learning_rate=self.learning_rate, warmup_steps=self.warmup_steps, beta2=0.99)

    def learning_rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0, as gpt_jax's schedule has it."""
        n, peak = iteration + 1, self.learning_rate
        if n < self.warmup_steps:
            return peak * n / self.warmup_steps
        done = (n - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def evaluates(self, iterations: int) -> bool:
        """Whether there is an evaluation after so many iterations; there is one before the first."""
        return iterations % self.eval_every == 0 or iterations == self.steps

    def describe(self) -> str:
        """The recipe in a line."""
        return (
            f"{self.n_layer} layers, {self.n_head} heads, width {self.d_model}, context {self.context_length}, "
            f"batch {self.batch_size}, no biases, no dropout; AdamW, learning rate {self.learning_rate:g} and a cosine "
            f"to a tenth over {self.steps} iterations, {self.warmup_steps} of warm-up, beta2 0.99, weight decay 0.1, "
            f"clipped at 1; every {self.eval_every} iterations, {self.eval_batches} batches of each split are evaluated"
        )


class Text(NamedTuple):
    """A text by characters: int32 arrays of the first nine tenths and of the rest."""

    train: np.ndarray
    val: np.ndarray
    vocab_size: int


class Windows:
    """The windows of a recipe, the same for all contestants: int32 (B, T + 1) a batch."""

    def __init__(self, recipe: Recipe, text: Text, draws: str) -> None:
        """draws: the file that `nanogpt.Draws` wrote."""
        self.recipe, self.text = recipe, text
        with np.load(draws) as file:
            self.starts = {name: file[name] for name in ("train", "train_eval", "val_eval")}

    def train(self, iteration: int) -> np.ndarray:
        """The batch of an iteration, counted from 0."""
        return self.cut(self.text.train, self.starts["train"][iteration])

    def evaluation(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The batches of both splits, training and validation, of an evaluation, counted from 0."""
        train, val = (self.starts[name][number] for name in ("train_eval", "val_eval"))
        return [self.cut(self.text.train, at) for at in train], [self.cut(self.text.val, at) for at in val]

    def cut(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Windows of a split, and the token after each."""
        return tokens[starts[:, None] + np.arange(self.recipe.context_length + 1)]


def read_text(path: str) -> Text:
    """The text of a UTF-8 file; its characters in their order are the vocabulary."""
    characters = np.frombuffer(Path(path).read_text(encoding="utf-8").encode("utf-32-le"), np.uint32)
    vocabulary = np.flatnonzero(np.bincount(characters))
    ids = np.zeros(vocabulary[-1] + 1, np.int32)
    ids[vocabulary] = np.arange(len(vocabulary))
    train, val = np.split(ids[characters], [int(0.9 * len(characters))])
    return Text(train, val, len(vocabulary))


def whole_val(recipe: Recipe, text: Text) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of the validation text in order: tokens (B, T + 1) and mask of the real targets (B, T), bool."""
    B, T = recipe.batch_size, recipe.context_length
    n_targets = len(text.val) - 1
    n_batches = -(-n_targets // (B * T))
    padded = np.resize(text.val, n_batches * B * T + 1)
    for first in range(0, n_batches * B * T, B * T):
        starts = first + np.arange(B)[:, None] * T
        yield padded[starts + np.arange(T + 1)], starts + np.arange(T) < n_targets


def say(**values: Any) -> None:
    """From a contestant's process: a line of JSON to the referee."""
    print(json.dumps(values), flush=True)


class Point(NamedTuple):
    """An evaluation: seconds since the process was started, iterations and tokens trained on, validation loss."""

    seconds: float
    iterations: int
    tokens: int
    val_loss: float


@dataclass
class Run:
    """A contestant's run: its evaluations, and what came after the clock had stopped."""

    curve: list[Point]
    whole_val_loss: float
    peak_bytes: int | None
    memory: Row | None = None

    def reached(self, target: float) -> Point | None:
        """The first evaluation at which the loss, to two decimals as nanoGPT tells its own, was down to the target."""
        return next((point for point in self.curve if round(point.val_loss, 2) <= target), None)

    def seconds(self, target: float) -> float:
        """Seconds to the target, or to the last evaluation where it was not reached."""
        return (self.reached(target) or self.curve[-1]).seconds


def run(
    results: Results,
    machine: Row,
    rounds: int,
    recipe: Recipe = Recipe(),
    path: Path | None = None,
    own_arguments: Sequence[str] = OWN_ARGUMENTS,
) -> None:
    """Measures the row, unless it is there already.

    path: the text, in place of tiny Shakespeare; own_arguments: those of `gpt_jax train` for its own recipe.
    """
    results.measure(NAME, recipe.describe(), compare, recipe, path, machine, rounds, own_arguments)


def find_text() -> Path:
    """Tiny Shakespeare: beside the repository, or in the cache, or downloaded. Raises UserError."""
    if TEXT.exists():
        return TEXT
    from gpt_jax.data.corpora import shakespeare

    return shakespeare()


def compare(recipe: Recipe, path: Path | None, machine: Row, rounds: int, own_arguments: Sequence[str]) -> Row:
    """The row. Raises FailedError when gpt_jax fails, and UserError when there is no text, or when the losses of the
    two sides differ."""
    path = path or find_text()
    with tempfile.TemporaryDirectory() as folder:
        return race(recipe, path.absolute(), machine, rounds, Path(folder), own_arguments)


def race(recipe: Recipe, path: Path, machine: Row, rounds: int, folder: Path, own_arguments: Sequence[str]) -> Row:
    """As `compare`, with a folder for what the contestants share."""
    on_cpu = machine["platform"] == "cpu"
    devices = 0 if on_cpu else 1  # On CPU what `train.py` would choose, and one accelerator, as PyTorch has.
    data, draws = folder / "data", str(folder / "draws.npz")
    write_draws(recipe, path, draws)
    spec = {"recipe": dataclasses.asdict(recipe), "path": str(path), "draws": draws}

    def script(name: str, **more: Any) -> Callable[[], Run]:
        return lambda: follow_script([f"benchmarks.{name}", json.dumps({**spec, **more})])

    def own_recipe() -> Run:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            flags = ["--data.dir", str(data), "--out-dir", out, "--parallel.devices", str(devices)]
            return follow_command(["gpt_jax", "train", *own_arguments, *flags], Path(out) / "metrics.jsonl", on_cpu)

    contestants = {OURS: script("learn_ours", devices=devices)}
    if machine["platform"] != "tpu":
        eager, compiled = PYTORCH
        contestants[eager] = script("learn_torch", compiled=False)
        contestants[compiled] = script("learn_torch", compiled=True)
    failed: dict[str, str] = {}
    try:
        prepare = ["gpt_jax", "prepare", str(path), "--out", str(data), "--model-type", "char"]
        with started(prepare, subprocess.DEVNULL):
            pass
        contestants[OWN_RECIPE] = own_recipe
    except FailedError as e:  # The commands need packages that the rest does without: command line, tokenizers.
        failed[OWN_RECIPE] = f"gpt_jax prepare {e}"
        print(f"  {OWN_RECIPE} is out: {failed[OWN_RECIPE]}", flush=True)
    runs = take_turns(
        contestants, rounds, lambda run: run(), lambda turn, name, done: show(turn, name, done, recipe.target), failed
    )
    if OURS in failed:
        raise FailedError(f"gpt_jax failed: {failed[OURS]}")
    others = [name for name in PYTORCH if name in runs]
    return {
        "recipe": recipe.describe(),
        "target": recipe.target,
        "rounds": len(runs[OURS]),
        "notes": NOTES,
        "failed": failed,
        "parity": {name: check_parity(runs[OURS][0], runs[name][0], name) for name in others},
        "contestants": {name: summary(runs[name], recipe.target) for name in runs},
        "times_as_fast": {name: times_as_fast(runs[name], runs[OURS], recipe.target) for name in others},
    }


def write_draws(recipe: Recipe, path: Path, draws: str) -> None:
    """Writes the initial parameters and the windows. Raises UserError when a split is shorter than a window."""
    text = read_text(str(path))
    if min(len(text.train), len(text.val)) < recipe.context_length + 1:
        raise UserError(f"the text is too short for windows of {recipe.context_length + 1} characters")
    with Worker("benchmarks.nanogpt:Draws") as worker:
        worker.ask("write", recipe=dataclasses.asdict(recipe), path=str(path), out=draws)


def initial_parameters(draws: str) -> dict[str, np.ndarray]:
    """The initial parameters in such a file, by path."""
    with np.load(draws) as file:
        return {name.removeprefix("parameters/"): file[name] for name in file if name.startswith("parameters/")}


@contextmanager
def started(arguments: list[str], stdout: int) -> Iterator[subprocess.Popen[str]]:
    """`python -m ...`, which is waited for at the end, or killed when the referee is interrupted.

    stdout: as Popen's. Raises FailedError when the process fails or takes too long, and OutOfTimeError.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=stdout,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        limit, begin = limit_seconds(), time.monotonic()
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            yield process
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        if status and time.monotonic() - begin >= limit:
            raise too_late(limit)
        if status:
            log.seek(0)
            lines = log.read().split("\n")
            raise FailedError(f"ended with status {status}: {next(filter(str.strip, lines[::-1]), '')[:200]}")


def follow_script(arguments: list[str]) -> Run:
    """The run of a contestant that tells of its evaluations on standard output. Raises FailedError."""
    begin = time.perf_counter()
    curve: list[Point] = []
    last: Row = {}
    with started(arguments, subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            if "val_loss" in last:
                curve.append(Point(time.perf_counter() - begin, **last))
    return Run(curve, **last)


def follow_command(arguments: list[str], metrics: Path, on_cpu: bool) -> Run:
    """The run of `gpt_jax train`, whose evaluations are looked for in its records. Raises FailedError."""
    begin = time.perf_counter()
    curve: list[Point] = []
    n_lines, peak_bytes = 0, 0
    with started(arguments, subprocess.DEVNULL) as process:
        ended = False
        while not ended:
            ended = process.poll() is not None  # Before the look at the records: the last ones count, too.
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
            seconds = time.perf_counter() - begin
            for record in map(json.loads, lines[n_lines:]):
                if "val_loss" in record:
                    curve.append(Point(seconds, record["step"], record["tokens"], record["val_loss"]))
            n_lines = len(lines)
            peak_bytes = max(peak_bytes, peak_memory(process.pid))
            time.sleep(0 if ended else 0.02)
    return Run(curve, curve[-1].val_loss, peak_bytes if on_cpu and peak_bytes else None)


def show(turn: int, name: str, done: Run, target: float) -> None:
    """Prints how a run went."""
    at, last = done.reached(target), done.curve[-1]
    when = f"{target} after {at.seconds:.1f} s, iteration {at.iterations}" if at else f"{target} not reached"
    print(
        f"  round {turn + 1}: {name:20} {when}; {last.val_loss:.4f} after {last.seconds:.1f} s, "
        f"{done.whole_val_loss:.4f} on the whole validation set",
        flush=True,
    )
    curve = (f"{point.iterations}: {point.val_loss:.4f} ({point.seconds:.1f} s)" for point in done.curve)
    print(f"    {', '.join(curve)}", flush=True)


def check_parity(ours: Run, theirs: Run, name: str) -> dict[str, float]:
    """How far the losses are apart. Raises UserError when that is more than is allowed."""
    found = {}
    for (when, tolerance), a, b in zip(TOLERANCES.items(), ours.curve, theirs.curve, strict=False):
        found[when] = abs(a.val_loss - b.val_loss) / b.val_loss
        if not found[when] <= tolerance:
            raise UserError(f"{NAME}: the {when} losses, of gpt_jax {a.val_loss:.4f} and of {name} {b.val_loss:.4f}")
    return found


def summary(runs: list[Run], target: float) -> Row:
    """What is kept of a contestant. The curve, and what belongs to it, is that of the round with the median time."""
    median = sorted(runs, key=lambda done: done.seconds(target))[len(runs) // 2]
    reached = all(done.reached(target) for done in runs)
    at, last = median.reached(target) or median.curve[-1], median.curve[-1]
    peaks = [done.peak_bytes for done in runs if done.peak_bytes is not None]
    return {
        "reached": reached,
        "seconds": spread([done.seconds(target) for done in runs]) if reached else None,
        "total_seconds": spread([done.curve[-1].seconds for done in runs]),
        "iterations": at.iterations,
        "tokens": at.tokens,
        "val_loss": last.val_loss,
        "whole_val_loss": median.whole_val_loss,
        "peak_bytes": max(peaks) if peaks else None,
        "memory": median.memory,
        "curve": [[point.seconds, point.iterations, point.val_loss] for point in median.curve],
    }


def times_as_fast(theirs: list[Run], ours: list[Run], target: float) -> dict[str, float]:
    """Their seconds to the target over ours, round by round; where not all reach it, those to the last evaluation."""
    if all(done.reached(target) for done in theirs + ours):
        return ratios([done.seconds(target) for done in theirs], [done.seconds(target) for done in ours])
    return ratios([done.curve[-1].seconds for done in theirs], [done.curve[-1].seconds for done in ours])
