"""Training steps, side by side: python -m benchmarks train [--preset nano baby gpt2], variants, largest and placement.

All contestants start with the same parameters and get the same batches. Each compiles and warms up, all must compute
the same, and then they take turns, a round of steps each, while the others wait; the first step of a turn is not timed.
What ends a row is raised as FailedError, OutOfTimeError or UserError, and `Results.measure` catches it.
"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import parity
from benchmarks.contest import OURS, PYTORCH, TRANSFORMERS, Contest
from benchmarks.machine import measure
from benchmarks.measure import ratios, spread
from benchmarks.presets import TINY, Preset, presets
from benchmarks.results import Results, Row
from benchmarks.worker import FailedError, OutOfTimeError, Worker
from gpt_jax.errors import UserError

WARM_UP = 1_000_000
"""The first batch of the steps that are not timed; those that are have smaller numbers."""

TRIES = 5
"""Batches that are tried in search of the largest one, at most."""

TARGET = "benchmarks.ours:Training"
THEIRS: dict[str, Row] = {
    PYTORCH[0]: {"target": "benchmarks.theirs:Training"},
    PYTORCH[1]: {"target": "benchmarks.theirs:Training", "compiled": True},
    TRANSFORMERS: {"target": "benchmarks.theirs:Training", "hugging_face": True},
}
"""The others, as workers."""


def run(results: Results, machine: Row, rounds: int, names: tuple[str, ...] = ()) -> None:
    """gpt_jax against PyTorch, for each preset of the machine's platform, or those named."""
    for preset in chosen_presets(machine, names):
        results.measure(f"train/{preset.name}", preset.describe(), compare_with_pytorch, preset, machine, rounds)


def run_variants(results: Results, machine: Row, rounds: int, names: tuple[str, ...] = ()) -> None:
    """gpt_jax as it chooses to run against gpt_jax with other placements, loops and attentions; unless presets are
    named, in the type that the platform is fast in."""
    usual = "float32" if machine["platform"] == "cpu" else "bfloat16"
    for preset in chosen_presets(machine, names):
        if names or preset.model.dtype == usual:
            results.measure(f"variants/{preset.name}", preset.describe(), compare_variants, preset, machine, rounds)


def run_largest(results: Results, machine: Row, rounds: int, name: str = "gpt2") -> None:
    """On a GPU: each contestant by itself, with the largest batch that its memory holds. Not in turns: two would not
    fit, and a step then takes long enough for the clock to be the smaller trouble."""
    row_name, known = f"train/{name}-largest-batch", results.rows.get(f"train/{name}")
    if machine["platform"] != "gpu":
        return
    if known is None:
        print(f"{row_name}: left out: train/{name} is to be measured first", flush=True)
        return
    preset = presets("gpu")[name]
    results.measure(row_name, f"as train/{name}, with other batches", compare_largest, preset, known, machine, rounds)


def chosen_presets(machine: Row, names: tuple[str, ...]) -> list[Preset]:
    """The presets to run. Raises UserError for a name that the platform does not have."""
    known = presets(machine["platform"])
    for name in names:
        if name not in known:
            raise UserError(f"there is no preset {name} on {machine['platform']}; there are {', '.join(known)}")
    return [preset for name, preset in known.items() if not names or name in names]


def as_chosen(machine: Row) -> dict[str, int]:
    """The placement of our contestant: on CPU what `train.py` would choose, and one accelerator, as PyTorch has."""
    return {} if machine["platform"] == "cpu" else {"devices": 1}


def enter(contest: Contest, preset: Preset, machine: Row, folder: Path, theirs: dict[str, Row]) -> str:
    """gpt_jax enters a contest, and where PyTorch runs the others, with its parameters; returns their file."""
    path = str(folder / "parameters.npz")
    ours = contest.add(OURS, TARGET, preset=preset.spec(), parallel=as_chosen(machine))
    if machine["platform"] != "tpu":
        ours.ask("write_parameters", path=path)
        for name, spec in theirs.items():
            contest.add(name, **spec, preset=preset.spec(), parameters=path)
    return path


def compare_with_pytorch(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset."""
    theirs = {name: spec for name, spec in THEIRS.items() if name in PYTORCH or preset.hugging_face}
    with tempfile.TemporaryDirectory() as folder, Contest() as contest:
        enter(contest, preset, machine, Path(folder), theirs)
        return time_training(contest, preset, machine, rounds, Path(folder))


def compare_variants(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset's variants; one that comes to a program that is there already is left out."""
    with Contest() as contest:
        known: list[Row] = []
        for name, spec in variants(preset, machine):
            how = contest.add(name, TARGET, **spec).ask("how")
            if how in known:
                contest.workers.pop(name).close()
            known.append(how)
        return time_training(contest, preset, machine, rounds, None)


def variants(preset: Preset, machine: Row) -> list[tuple[str, Row]]:
    """Names and arguments of our contestant: as `train.py` would have it, and each other choice by itself."""
    c, on_cpu = preset.model, machine["platform"] == "cpu"

    def spec(parallel: dict[str, int] | None = None, **changes: Any) -> Row:
        changed = dataclasses.replace(preset, model=dataclasses.replace(c, **changes))
        return {"preset": changed.spec(), "parallel": as_chosen(machine) if parallel is None else parallel}

    n_devices = machine["cores"] if on_cpu else machine["devices"]
    attentions = {"cpu": ("xla", "block_causal"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}
    chosen = {OURS: spec()}
    if n_devices > 1:
        chosen["1 device"] = spec({"devices": 1})
    chosen["mesh, 1 device"] = spec({"devices": 1, "data": 1})
    if n_devices > 1 and preset.batch_size % n_devices == 0:
        chosen[f"pmap, {n_devices} devices"] = spec({"devices": n_devices})
        chosen[f"mesh, {n_devices} devices"] = spec({"devices": n_devices, "data": n_devices})
    chosen["layers scanned" if c.unroll else "layers unrolled"] = spec(unroll=not c.unroll)
    chosen |= {f"attention {name}": spec(attention=name) for name in attentions[machine["platform"]]}
    return list(chosen.items())


def placement(rounds: int) -> Row:
    """What a mesh costs on CPU: a row for each of two presets, by jit on one device and on a mesh of one, and one for a
    model so small that there is little to a step but its call, by pmap on two devices and on a mesh of two."""
    one = {"jit": {"devices": 1}, "mesh": {"devices": 1, "data": 1}}
    two = {"pmap": {"devices": 2}, "mesh": {"devices": 2, "data": 2}}
    nano, baby = (presets("cpu")[name] for name in ("nano", "baby"))
    return {p.name: compare_placements(p, kinds, rounds) for p, kinds in ((nano, one), (baby, one), (TINY, two))}


def compare_placements(preset: Preset, kinds: dict[str, dict[str, int]], rounds: int) -> Row:
    """Milliseconds of a step, and of its call alone, of two placements, and the second's steps over the first's."""
    with Contest() as contest:
        for kind, parallel in kinds.items():
            contest.add(kind, TARGET, preset=preset.spec(), parallel=parallel)
        contest.once("step_and_call_ms", count=1)
        turns = contest.turns(rounds, lambda worker: worker.ask("step_and_call_ms", count=preset.steps))
    if contest.failed:
        raise FailedError(f"{preset.name}: {contest.failed}")
    steps, calls = ({kind: [turn[i] for turn in turns[kind]] for kind in kinds} for i in (0, 1))
    row: Row = {
        "step_ms": {kind: spread(values) for kind, values in steps.items()},
        "call_ms": {kind: spread(values) for kind, values in calls.items()},
        "second_over_first": ratios(*reversed(steps.values())),
    }
    medians = [f"{kind} {found['median']:.2f} ms a step" for kind, found in row["step_ms"].items()]
    print(f"{preset.name}: {', '.join(medians)}", flush=True)
    return row


def time_training(contest: Contest, preset: Preset, machine: Row, rounds: int, folder: Path | None) -> Row:
    """Compiles, warms up, checks parity if there is a folder for the arrays, and times in turns; returns the row."""
    first_seconds = contest.once("seconds", first=WARM_UP, count=1)
    n_steps = 2 if preset.steps is None else preset.steps
    warm = contest.once("seconds", first=WARM_UP, count=n_steps)
    if preset.steps is None:
        n_steps = max(2, min(50, math.ceil(0.5 / max(warm.values(), default=0.5))))
    about = {what: contest.once(what) for what in ("how", "peak_bytes", "memory")}
    differences = check_parity(contest, preset, folder) if folder else {}
    peak_flops, source = peak(preset, machine)
    turns = iter(range(rounds * len(contest.workers)))

    def seconds_a_step(worker: Worker) -> float:
        # A step that is not timed: while others had their turn, the system took the caches and, from XLA, freed memory,
        # which it has to find anew; training has no such pauses.
        worker.ask("seconds", first=WARM_UP, count=1)
        first = 1 + next(turns) // len(contest.workers) * n_steps
        return float(worker.ask("seconds", first=first, count=n_steps))

    def show(turn: int, name: str, value: float) -> None:
        print(f"  round {turn + 1}: {name:20} {1e3 * value:9.1f} ms a step", flush=True)

    seconds = contest.turns(rounds, seconds_a_step, show)
    row: Row = {
        "preset": preset.spec(),
        "dtype": preset.model.dtype,
        "rounds": max(map(len, seconds.values()), default=0),
        "parity": differences,
        "flops_per_token": preset.flops_per_token,
        "peak_flops": peak_flops,
        "peak_source": source,
        "contestants": {},
        "failed": contest.failed,
        "notes": [],
    }
    for name, values in seconds.items():
        devices = 1 if machine["platform"] == "cpu" else about["how"][name].get("devices", 1)
        rates = [preset.tokens_per_step / value for value in values]
        shares = [rate * preset.flops_per_token / (devices * peak_flops) for rate in rates if peak_flops]
        row["contestants"][name] = {
            "step_ms": spread([1e3 * value for value in values]),
            "tokens_per_second": spread(rates),
            "mfu": spread(shares) if shares else None,
            "compile_seconds": max(0.0, first_seconds[name] - spread(values)["median"]),
            **{what: answers[name] for what, answers in about.items()},
        }
    others = [name for name in PYTORCH if name in seconds]
    if others and OURS in seconds:
        better = min(others, key=lambda name: spread(seconds[name])["median"])
        row["times_as_fast"] = {"over": better, **ratios(seconds[better], seconds[OURS])}
        print(f"  gpt_jax is {row['times_as_fast']['median']:.2f} times as fast as {better}", flush=True)
    return row


def check_parity(contest: Contest, preset: Preset, folder: Path) -> Row:
    """How far what each contestant computes is from gpt_jax's. Raises UserError when that is too far."""
    computed = {name: found[0] for name, found in contest.turns(1, lambda w: parity.compute(w, folder)).items()}
    differences: Row = {}
    if (ours := computed.pop(OURS, None)) is None:
        return differences
    for name, theirs in computed.items():
        differences[name] = parity.compare(ours, theirs)
        parity.check(differences[name], preset.model.dtype, f"{preset.name}: gpt_jax and {name}")
    if differences:
        print(f"  {', '.join(differences)}: compute the same as gpt_jax", flush=True)
    return differences


def peak(preset: Preset, machine: Row) -> tuple[float | None, str]:
    """Peak FLOP/s of a device in the preset's dtype, and where that is from; None where it is not known."""
    if machine["platform"] != "cpu":
        return machine["peak_flops"], "the maker's data sheet, bfloat16"
    if preset.model.dtype != "float32":
        return None, ""
    try:
        return measure("matmul"), "the fastest product of two 2048 x 2048 matrices, in the better of both libraries"
    except FailedError:
        return None, ""


def compare_largest(preset: Preset, known: Row, machine: Row, rounds: int) -> Row:
    """The row; known: that of the preset at its own batch. Raises FailedError when ours has no larger batch."""
    memory = measure("device_memory")
    # PyTorch may take all of the memory, so that JAX may, too: by itself it would stop at three quarters.
    all_of_it = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    specs: dict[str, Row] = {OURS: {"target": TARGET, "environment": all_of_it, "parallel": as_chosen(machine)}}
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        with Contest() as contest:
            parameters = enter(contest, preset, machine, Path(folder), {})
        specs |= {name: {**THEIRS[name], "parameters": parameters} for name in PYTORCH}
        for name in (name for name in specs if name in known["contestants"]):
            guess = batch_that_fits(preset, known["contestants"][name]["peak_bytes"], memory)
            found = with_largest_batch(name, specs[name], preset, guess, machine, rounds)
            if isinstance(found, str):
                failed[name] = found
            else:
                rows[name] = found
    if OURS not in rows:
        raise FailedError(f"gpt_jax has no larger batch than {preset.batch_size}")
    batches = ", ".join(f"{name} {found['how']['batch']}" for name, found in rows.items())
    notes = [
        f"one contestant after the other, each with the largest batch that its memory holds: {batches}",
        f"that all compute the same was checked at a batch of {preset.batch_size} only",
    ]
    row = {**known, "rounds": rounds, "parity": {}, "contestants": rows, "failed": failed, "notes": notes}
    row.pop("times_as_fast", None)
    rates = {name: found["tokens_per_second"] for name, found in rows.items()}
    ours = rates.pop(OURS)
    if rates:
        better = max(rates, key=lambda name: rates[name]["median"])
        theirs = rates[better]  # The rounds were not side by side: the extremes are those of any two.
        extremes = {"min": ours["min"] / theirs["max"], "max": ours["max"] / theirs["min"]}
        row["times_as_fast"] = {"over": better, "median": ours["median"] / theirs["median"], **extremes}
    return row


def with_largest_batch(name: str, spec: Row, preset: Preset, batch: int, machine: Row, rounds: int) -> Row | str:
    """A contestant's figures with the largest batch that was found to fit, or why none larger than the preset's does.

    Begins with `batch`, goes up by a sixth where that fits, and down where it does not, until it would meet what it
    knows already.
    """
    fits, fails = preset.batch_size, math.inf
    found: Row | str = f"no batch larger than {fits} was tried: {batch} is guessed to fit"
    for _ in range(TRIES):
        if not fits < batch < fails:
            break
        try:
            found = time_alone(name, spec, dataclasses.replace(preset, batch_size=batch, steps=5), machine, rounds)
            fits, batch = batch, 7 * batch // 6 // 4 * 4
        except FailedError as e:
            fails, batch = batch, 6 * batch // 7 // 4 * 4
            if isinstance(found, str):
                found = f"batch {fails}: {e}"
        except OutOfTimeError:
            if isinstance(found, str):
                raise
            break
    return found


def time_alone(name: str, spec: Row, preset: Preset, machine: Row, rounds: int) -> Row:
    """The figures of a contestant without others."""
    print(f"  {name}, batch {preset.batch_size}", flush=True)
    with Contest(needs=name) as contest:
        contest.add(name, **spec, preset=preset.spec())
        found = time_training(contest, preset, machine, rounds, None)["contestants"][name]
    return {**found, "how": {**found["how"], "batch": preset.batch_size}}


def batch_that_fits(preset: Preset, peak_bytes: int, memory: float) -> int:
    """A guess, a multiple of 4, from the peak at the preset's batch: parameters, gradients and Adam's two moments, 16
    bytes a parameter, stay as they are, and the rest grows with the batch."""
    fixed = 16 * preset.model.n_params
    per_sequence = max(1.0, (peak_bytes - fixed) / preset.batch_size)
    return int((0.9 * memory - fixed) / per_sequence) // 4 * 4
