"""Learning, everything included: python -m benchmarks learn

Wall time from the start of the process to the first evaluation at which the loss is down to the target, on tiny
Shakespeare by characters. Imports, reading the text, compiling, training and evaluating all count, so each contestant
is a process started anew for each round, with nothing compiled before. gpt_jax and PyTorch follow one recipe, from the
same initial parameters on the same windows; besides, there is the command of gpt_jax with its own recipe.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import parity
from benchmarks.contest import OURS, PYTORCH, Contest
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

EVALUATED = "  val loss "
"""What a line of `gpt_jax train` has in it that is printed at an evaluation."""

TOLERANCES = {"initial losses": 2e-3, "first losses": 2e-2}
"""Of the loss, relative: before the first iteration, and at the first evaluation after it."""

NOTES = [
    "both sides have the initial parameters and the windows that nanoGPT draws with its seed, its estimates of the "
    f"loss included; the loss of {OWN_RECIPE!r} is of the whole validation set, at another learning rate",
    "GELU is the tanh form on both sides, where nanoGPT has the exact one",
    "the loss aimed at is the one that nanoGPT's README tells of, to two decimals",
    "s in all is the time to the last evaluation; the loss at the end is that of the whole validation set, computed "
    "after it",
    "where the loss is not reached, times as fast is by the seconds in all",
]


class Point(NamedTuple):
    """An evaluation: seconds since the process was started, steps and tokens trained on, validation loss."""

    seconds: float
    step: int
    tokens: int
    val_loss: float


class Run(NamedTuple):
    """A contestant's run: its evaluations, and what came after the clock had stopped."""

    target: float
    curve: list[Point]
    whole_val_loss: float
    memory: Row

    @property
    def reached(self) -> Point | None:
        """The first evaluation at which the loss, to two decimals as nanoGPT tells its own, was down to the target."""
        return next((point for point in self.curve if round(point.val_loss, 2) <= self.target), None)

    @property
    def end(self) -> Point:
        """The evaluation at which the target was reached, or the last one."""
        return self.reached or self.curve[-1]


def run(results: Results, machine: Row, rounds: int, recipe: Recipe = RECIPE, path: Path | None = None) -> None:
    """Measures the row, unless it is there already. path: the text, in place of tiny Shakespeare."""
    with tempfile.TemporaryDirectory() as folder:
        results.measure(NAME, recipe.describe(), compare, recipe, path, machine, rounds, folder)


def compare(recipe: Recipe, path: Path | None, machine: Row, rounds: int, folder: str) -> Row:
    """The row. Raises FailedError when gpt_jax fails, and UserError when there is no text, or when the losses of the
    two sides differ. folder: for what the contestants share."""
    data, path = f"{folder}/data", (path or shakespeare()).absolute()
    text = read_text(str(path))
    recipe, window = recipe.of(text), recipe.preset.model.context_length + 1
    if min(len(text.train), len(text.val)) < window:
        raise UserError(f"the text is too short for windows of {window} characters")
    task: Row = {"recipe": recipe, "path": str(path)}
    with Worker("benchmarks.nanogpt:Draws") as worker:
        task["parameters"], task["starts"] = worker.ask("draw", **task)

    def learner(target: str, **more: Any) -> Callable[[], Run]:
        def run() -> Run:
            begun = time.monotonic()
            with Worker(target, preset=recipe.preset, **more) as worker:
                curve, *found = worker.ask("learn", **task, begun=begun)
                return Run(recipe.target, [Point(*point) for point in curve], *found)

        return run

    def own_recipe() -> Run:
        out = tempfile.mkdtemp(dir=folder)
        flags = (f"--data.dir={data}", f"--out-dir={out}", f"--parallel.devices={as_chosen(machine).devices}")
        done = run_command("-m", "gpt_jax", "train", *recipe.own_arguments, *flags, environment=ENVIRONMENT)
        times = [seconds for seconds, line in done.lines if EVALUATED in line]
        records = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        evaluated = [[record[name] for name in Point._fields[1:]] for record in records if "val_loss" in record]
        curve = [Point(seconds, *record) for seconds, record in zip(times, evaluated, strict=True)]
        peak_bytes = done.peak_bytes if machine["platform"] == "cpu" else None
        return Run(recipe.target, curve, curve[-1].val_loss, {"peak_bytes": peak_bytes, "memory": None})

    contest = Contest()
    contest.contestants[OURS] = learner("benchmarks.ours:Training", parallel=as_chosen(machine))
    if machine["platform"] != "tpu":
        contest.contestants |= {name: learner(**THEIRS[name]) for name in PYTORCH}
    prepare = ("-m", "gpt_jax", "prepare", str(path), "--out", data, "--model-type", "char")
    try:
        run_command(*prepare, environment=ENVIRONMENT)
        contest.contestants[OWN_RECIPE] = own_recipe
    except FailedError as e:  # The commands need packages that the rest does without: command line, tokenizers.
        contest.failed[OWN_RECIPE] = f"gpt_jax prepare {e}"
        print(f"  {OWN_RECIPE} is out: {contest.failed[OWN_RECIPE]}", flush=True)
    runs: dict[str, list[Run]] = contest.turns(rounds, lambda run: run(), show)
    others = [name for name in PYTORCH if name in runs]
    return {
        "target": recipe.target,
        "rounds": len(runs[OURS]),
        "notes": [recipe.describe(), *NOTES],
        "failed": contest.failed,
        "parity": {name: check_parity(runs[OURS][0], runs[name][0], name) for name in others},
        "contestants": {name: summary(runs[name]) for name in runs},
        "times_as_fast": {name: times_as_fast(runs[name], runs[OURS]) for name in others},
    }


def show(turn: int, name: str, done: Run) -> None:
    """Prints how a run went."""
    at, last = done.reached, done.curve[-1]
    when = f"{done.target} after {at.seconds:.1f} s, step {at.step}" if at else f"{done.target} not reached"
    print(f"  round {turn + 1}: {name:20} {when}; {last.val_loss:.4f} after {last.seconds:.1f} s", flush=True)


def check_parity(ours: Run, theirs: Run, name: str) -> dict[str, float]:
    """How far the losses are apart. Raises UserError when that is more than is allowed."""
    pairs = zip(TOLERANCES, ours.curve, theirs.curve, strict=False)
    found = {when: abs(a.val_loss / b.val_loss - 1) for when, a, b in pairs}
    parity.check(found, TOLERANCES, name)
    return found


def summary(runs: list[Run]) -> Row:
    """What is kept of a contestant. The curve, and what belongs to it, is that of the round with the median time."""
    median = sorted(runs, key=lambda done: done.end.seconds)[len(runs) // 2]
    return {
        "seconds": spread([done.end.seconds for done in runs]) if all(done.reached for done in runs) else None,
        "total_seconds": spread([done.curve[-1].seconds for done in runs]),
        "iterations": median.end.step,
        "tokens": median.end.tokens,
        "whole_val_loss": median.whole_val_loss,
        **median.memory,
        "curve": [[point.seconds, point.step, point.val_loss] for point in median.curve],
    }


def times_as_fast(theirs: list[Run], ours: list[Run]) -> dict[str, float]:
    """Their seconds to the target over ours, round by round; where not all reach it, those to the last evaluation."""
    reached = all(done.reached for done in theirs + ours)
    seconds = ([(done.end if reached else done.curve[-1]).seconds for done in runs] for runs in (theirs, ours))
    return ratios(*seconds)
