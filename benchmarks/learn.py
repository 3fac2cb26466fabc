"""Learning, everything included: python -m benchmarks learn

Wall time from the start of the process to the first evaluation at which the loss is down to the target, on tiny
Shakespeare by characters. Imports, reading the text, compiling, training and evaluating all count, so each contestant
is a process started anew for each round, with nothing compiled before. gpt_jax and PyTorch follow one recipe, from the
same initial parameters on the same windows; besides, there is the command of gpt_jax with its own recipe.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contest import OURS, PYTORCH, take_turns
from benchmarks.measure import ratios, run_command, spread
from benchmarks.recipe import Recipe, read_text
from benchmarks.results import Results, Row
from benchmarks.train import THEIRS, as_chosen
from benchmarks.worker import ENVIRONMENT, FailedError, Worker
from gpt_jax.data.corpora import shakespeare
from gpt_jax.errors import UserError

NAME = "learn/shakespeare-char"
RECIPE = Recipe()
OWN_RECIPE = "gpt_jax, own recipe"
OWN_ARGUMENTS = ("configs/shakespeare_char_cpu.py", "--train.eval-every=250")

EVALUATED = "  val loss "
"""What a line of `gpt_jax train` has in it that is printed at an evaluation."""

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


class Point(NamedTuple):
    """An evaluation: seconds since the process was started, iterations and tokens trained on, validation loss."""

    seconds: float
    iterations: int
    tokens: int
    val_loss: float


@dataclass
class Run:
    """A contestant's run: its evaluations, and what came after the clock had stopped."""

    target: float
    curve: list[Point]
    whole_val_loss: float
    peak_bytes: int | None
    memory: Row | None = None

    @property
    def reached(self) -> Point | None:
        """The first evaluation at which the loss, to two decimals as nanoGPT tells its own, was down to the target."""
        return next((point for point in self.curve if round(point.val_loss, 2) <= self.target), None)

    @property
    def end(self) -> Point:
        """The evaluation at which the target was reached, or the last one."""
        return self.reached or self.curve[-1]


def run(
    results: Results,
    machine: Row,
    rounds: int,
    recipe: Recipe = RECIPE,
    path: Path | None = None,
    own_arguments: Sequence[str] = OWN_ARGUMENTS,
) -> None:
    """Measures the row, unless it is there already.

    path: the text, in place of tiny Shakespeare; own_arguments: those of `gpt_jax train` for its own recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        results.measure(NAME, recipe.describe(), compare, recipe, path, machine, rounds, own_arguments, folder)


def compare(
    recipe: Recipe, path: Path | None, machine: Row, rounds: int, own_arguments: Sequence[str], folder: str
) -> Row:
    """The row. Raises FailedError when gpt_jax fails, and UserError when there is no text, or when the losses of the
    two sides differ. folder: for what the contestants share."""
    data, parameters, draws = (f"{folder}/{name}" for name in ("data", "parameters.npz", "draws.npz"))
    path = (path or shakespeare()).absolute()
    text = read_text(str(path))
    recipe, window = recipe.of(text), recipe.preset.model.context_length + 1
    if min(len(text.train), len(text.val)) < window:
        raise UserError(f"the text is too short for windows of {window} characters")
    task = {"recipe": dataclasses.asdict(recipe), "path": str(path), "draws": draws}
    with Worker("benchmarks.nanogpt:Draws") as worker:
        worker.ask("write", **task, parameters=parameters)

    def learner(target: str, **more: Any) -> Callable[[], Run]:
        def run() -> Run:
            begun = time.monotonic()
            with Worker(target, preset=recipe.preset.spec(), parameters=parameters, **more) as worker:
                answer = worker.ask("learn", **task, begun=begun)
            return Run(recipe.target, **{**answer, "curve": [Point(*point) for point in answer["curve"]]})

        return run

    def own_recipe() -> Run:
        out = tempfile.mkdtemp(dir=folder)
        flags = [f"--data.dir={data}", f"--out-dir={out}"]
        flags += [f"--parallel.{name}={value}" for name, value in as_chosen(machine).items()]
        done = run_command("-m", "gpt_jax", "train", *own_arguments, *flags, environment=ENVIRONMENT)
        records = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        times = [seconds for seconds, line in done.lines if EVALUATED in line]
        evaluated = [
            (record["step"], record["tokens"], record["val_loss"]) for record in records if "val_loss" in record
        ]
        curve = [Point(seconds, *record) for seconds, record in zip(times, evaluated, strict=True)]
        return Run(recipe.target, curve, curve[-1].val_loss, done.peak_bytes if machine["platform"] == "cpu" else None)

    contestants = {OURS: learner("benchmarks.ours:Training", parallel=as_chosen(machine))}
    if machine["platform"] != "tpu":
        contestants |= {name: learner(**THEIRS[name]) for name in PYTORCH}
    failed: dict[str, str] = {}
    try:
        prepare = ("-m", "gpt_jax", "prepare", str(path), "--out", data, "--model-type", "char")
        run_command(*prepare, environment=ENVIRONMENT)
        contestants[OWN_RECIPE] = own_recipe
    except FailedError as e:  # The commands need packages that the rest does without: command line, tokenizers.
        failed[OWN_RECIPE] = f"gpt_jax prepare {e}"
        print(f"  {OWN_RECIPE} is out: {failed[OWN_RECIPE]}", flush=True)
    runs = take_turns(contestants, rounds, lambda run: run(), show, failed)
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
        "contestants": {name: summary(runs[name]) for name in runs},
        "times_as_fast": {name: times_as_fast(runs[name], runs[OURS]) for name in others},
    }


def show(turn: int, name: str, done: Run) -> None:
    """Prints how a run went."""
    at, last = done.reached, done.curve[-1]
    when = f"{done.target} after {at.seconds:.1f} s, iteration {at.iterations}" if at else f"{done.target} not reached"
    curve = ", ".join(f"{point.iterations}: {point.val_loss:.4f} ({point.seconds:.1f} s)" for point in done.curve)
    print(
        f"  round {turn + 1}: {name:20} {when}; {last.val_loss:.4f} after {last.seconds:.1f} s, "
        f"{done.whole_val_loss:.4f} on the whole validation set\n    {curve}",
        flush=True,
    )


def check_parity(ours: Run, theirs: Run, name: str) -> dict[str, float]:
    """How far the losses are apart. Raises UserError when that is more than is allowed."""
    found = {}
    for (when, tolerance), a, b in zip(TOLERANCES.items(), ours.curve, theirs.curve, strict=False):
        found[when] = abs(a.val_loss - b.val_loss) / b.val_loss
        if not found[when] <= tolerance:
            raise UserError(f"{NAME}: the {when} losses, of gpt_jax {a.val_loss:.4f} and of {name} {b.val_loss:.4f}")
    return found


def summary(runs: list[Run]) -> Row:
    """What is kept of a contestant. The curve, and what belongs to it, is that of the round with the median time."""
    median = sorted(runs, key=lambda done: done.end.seconds)[len(runs) // 2]
    reached = all(done.reached for done in runs)
    return {
        "reached": reached,
        "seconds": spread([done.end.seconds for done in runs]) if reached else None,
        "total_seconds": spread([done.curve[-1].seconds for done in runs]),
        "iterations": median.end.iterations,
        "tokens": median.end.tokens,
        "val_loss": median.curve[-1].val_loss,
        "whole_val_loss": median.whole_val_loss,
        "peak_bytes": max((done.peak_bytes for done in runs if done.peak_bytes is not None), default=None),
        "memory": median.memory,
        "curve": [[point.seconds, point.iterations, point.val_loss] for point in median.curve],
    }


def times_as_fast(theirs: list[Run], ours: list[Run]) -> dict[str, float]:
    """Their seconds to the target over ours, round by round; where not all reach it, those to the last evaluation."""
    reached = all(done.reached for done in theirs + ours)
    seconds = ([(done.end if reached else done.curve[-1]).seconds for done in runs] for runs in (theirs, ours))
    return ratios(*seconds)
