"""Training steps, side by side: python -m benchmarks train [--preset nano baby gpt2], variants and largest.

All contestants start with the same parameters and get the same batches. Each compiles and warms up, all must compute
the same, and then they take turns, a round of steps each, while the others wait; the first step of a turn is not timed.
What ends a row is raised as FailedError, OutOfTimeError or UserError, and `Results.measure` catches it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from benchmarks import parity
from benchmarks.contest import OURS, PYTORCH, TRANSFORMERS, Contest
from benchmarks.contestants import Arrays
from benchmarks.machine import fastest_matmul
from benchmarks.markdown import flops
from benchmarks.measure import ratios, spread
from benchmarks.presets import Preset, presets
from benchmarks.results import Results, Row
from benchmarks.worker import Worker
from gpt_jax.config import ModelConfig, ParallelConfig
from gpt_jax.errors import UserError

WARM_UP = 1_000_000
"""The first batch of the steps that are not timed; those that are have smaller numbers."""

TARGET = "benchmarks.ours:Training"
THEIRS: dict[str, Row] = {
    PYTORCH[0]: {"target": "benchmarks.theirs:Training"},
    PYTORCH[1]: {"target": "benchmarks.theirs:Training", "compiled": True},
    TRANSFORMERS: {"target": "benchmarks.theirs:Training", "hugging_face": True},
}
"""The others, as workers."""


def run(results: Results, machine: Row, rounds: int, names: Sequence[str] = ()) -> None:
    """gpt_jax against PyTorch, for each preset of the machine's platform, or those named."""
    for preset in chosen_presets(machine, names):
        results.measure(f"train/{preset.name}", preset.describe(), compare_with_pytorch, preset, machine, rounds)


def run_variants(results: Results, machine: Row, rounds: int, names: Sequence[str] = ()) -> None:
    """gpt_jax as it chooses to run against gpt_jax with other placements, loops and attentions; unless presets are
    named, in the type that the platform is fast in."""
    usual = "float32" if machine["platform"] == "cpu" else "bfloat16"
    for preset in chosen_presets(machine, names):
        if names or preset.model.dtype == usual:
            results.measure(f"variants/{preset.name}", preset.describe(), compare_variants, preset, machine, rounds)


def run_largest(results: Results, machine: Row, rounds: int, name: str = "gpt2") -> None:
    """On a GPU: a row for each of the batches that are twice as large as the one before, until none fits."""
    row: Row | None = {"contestants": True}
    preset = presets("gpu")[name]
    while machine["platform"] == "gpu" and row and row["contestants"]:
        preset = replace(
            preset, name=f"{name}-batch-{2 * preset.batch_size}", batch_size=2 * preset.batch_size, steps=5
        )
        results.measure(f"train/{preset.name}", preset.describe(), compare_alone, preset, machine, rounds)
        row = results.rows.get(f"train/{preset.name}")


def chosen_presets(machine: Row, names: Sequence[str]) -> list[Preset]:
    """The presets to run. Raises UserError for a name that the platform does not have."""
    known = presets(machine["platform"])
    for name in names:
        if name not in known:
            raise UserError(f"there is no preset {name} on {machine['platform']}; there are {', '.join(known)}")
    return [preset for name, preset in known.items() if not names or name in names]


def as_chosen(machine: Row) -> ParallelConfig:
    """The placement of our contestant: on CPU what `train.py` would choose, and one accelerator, as PyTorch has."""
    return ParallelConfig() if machine["platform"] == "cpu" else ParallelConfig(devices=1)


def enter(contest: Contest, preset: Preset, machine: Row, theirs: dict[str, Row]) -> Arrays:
    """gpt_jax enters a contest, and where PyTorch runs the others; returns the parameters to start from."""
    ours = contest.add(OURS, TARGET, preset=preset, parallel=as_chosen(machine))
    if machine["platform"] == "tpu":
        return {}
    for name, spec in theirs.items():
        contest.add(name, **spec, preset=preset)
    parameters: Arrays = ours.ask("initial")
    return parameters


def compare_with_pytorch(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset."""
    theirs = {name: spec for name, spec in THEIRS.items() if name in PYTORCH or preset.hugging_face}
    with Contest() as contest:
        return time_training(contest, preset, machine, rounds, enter(contest, preset, machine, theirs))


def compare_variants(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset's variants, with the time of a step's call, which does not wait for what it computes; one
    that comes to a program that is there already is left out."""
    with Contest() as contest:
        known: list[Row] = []
        for name, spec in variants(preset, machine).items():
            how = contest.add(name, TARGET, **spec).ask("how")
            if how in known:
                contest.contestants.pop(name).close()
            known.append(how)
        row = time_training(contest, preset, machine, rounds)
        for name, calls in contest.turns(rounds, lambda w: float(w.ask("call_ms", count=preset.steps))).items():
            row["contestants"][name]["call_ms"] = spread(calls)
        return row


def variants(preset: Preset, machine: Row) -> dict[str, Row]:
    """The arguments of our contestant, by name: as `train.py` would have it, and each other choice by itself."""
    on_cpu, unroll = machine["platform"] == "cpu", preset.model.unroll
    n_devices = machine["cores"] if on_cpu else machine["devices"]
    placements = {"1 device": {"devices": 1}, "mesh, 1 device": {"devices": 1, "data": 1}}
    if n_devices == 1:
        del placements["1 device"]
    elif preset.batch_size % n_devices == 0:
        placements[f"pmap, {n_devices} devices"] = {"devices": n_devices}
        placements[f"mesh, {n_devices} devices"] = {"devices": n_devices, "data": n_devices}
    attentions = {"cpu": ("xla", "block_causal"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}
    models: dict[str, ModelConfig] = {
        "layers scanned" if unroll else "layers unrolled": replace(preset.model, unroll=not unroll)
    }
    for name in attentions[machine["platform"]]:
        models[f"attention {name}"] = replace(preset.model, attention=name)  # type: ignore[arg-type]
    chosen = as_chosen(machine)
    return {
        OURS: {"preset": preset, "parallel": chosen},
        **{name: {"preset": preset, "parallel": ParallelConfig(**fields)} for name, fields in placements.items()},
        **{name: {"preset": replace(preset, model=model), "parallel": chosen} for name, model in models.items()},
    }


def time_training(contest: Contest, preset: Preset, machine: Row, rounds: int, parameters: Arrays | None = None) -> Row:
    """Compiles, warms up, checks parity if there are parameters to start from, times in turns; returns the row."""
    from gpt_jax.model.flops import flops_per_token

    first_seconds = contest.once("seconds", first=WARM_UP, count=1)
    n_steps = 2 if preset.steps is None else preset.steps
    warm = contest.once("seconds", first=WARM_UP, count=n_steps)
    if preset.steps is None:
        n_steps = max(2, min(50, math.ceil(0.5 / max(warm.values(), default=0.5))))
    hows, memory = contest.once("how"), contest.once("memory")
    differences = check_parity(contest, preset, parameters) if parameters else {}
    peak_flops, source = peak(preset, machine)
    peak_note = [f"MFU is of {flops(peak_flops)} in {preset.model.dtype}: {source}"] if peak_flops else []
    turns = iter(range(rounds * len(contest.contestants)))

    def seconds_a_step(worker: Worker) -> float:
        # A step that is not timed: while others had their turn, the system took the caches and, from XLA, freed memory,
        # which it has to find anew; training has no such pauses.
        worker.ask("seconds", first=WARM_UP, count=1)
        first = 1 + next(turns) // len(contest.contestants) * n_steps
        return float(worker.ask("seconds", first=first, count=n_steps))

    def show(turn: int, name: str, value: float) -> None:
        print(f"  round {turn + 1}: {name:20} {1e3 * value:9.1f} ms a step", flush=True)

    seconds = contest.turns(rounds, seconds_a_step, show)
    row: Row = {
        "preset": asdict(preset),
        "dtype": preset.model.dtype,
        "rounds": max(map(len, seconds.values()), default=0),
        "parity": differences,
        "flops_per_token": flops_per_token(preset.model),
        "peak_flops": peak_flops,
        "contestants": {},
        "failed": contest.failed,
        "notes": [preset.describe(), *peak_note],
    }
    for name, values in seconds.items():
        devices = 1 if machine["platform"] == "cpu" else hows[name].get("devices", 1)
        rates = [preset.tokens_per_step / value for value in values]
        shares = [rate * row["flops_per_token"] / (devices * peak_flops) for rate in rates if peak_flops]
        row["contestants"][name] = {
            "step_ms": spread([1e3 * value for value in values]),
            "tokens_per_second": spread(rates),
            "mfu": spread(shares) if shares else None,
            "compile_seconds": max(0.0, first_seconds[name] - spread(values)["median"]),
            "how": hows[name],
            **memory[name],
        }
    others = [name for name in PYTORCH if name in seconds]
    if others and OURS in seconds:
        better = min(others, key=lambda name: spread(seconds[name])["median"])
        row["times_as_fast"] = {"over": better, **ratios(seconds[better], seconds[OURS])}
        print(f"  gpt_jax is {row['times_as_fast']['median']:.2f} times as fast as {better}", flush=True)
    return row


def check_parity(contest: Contest, preset: Preset, parameters: Arrays) -> Row:
    """How far what each contestant computes is from gpt_jax's. Raises UserError when that is too far."""
    computed = contest.once("compute", parameters=parameters, steps=parity.STEPS)
    ours = computed.pop(OURS, None)
    differences = {name: parity.compare(ours, theirs) for name, theirs in computed.items() if ours}
    for name, found in differences.items():
        parity.check(found, parity.TOLERANCES[preset.model.dtype], name)
        print(f"  {name} computes the same as gpt_jax", flush=True)
    return differences


def peak(preset: Preset, machine: Row) -> tuple[float | None, str]:
    """Peak FLOP/s of a device in the preset's dtype, and where that is from; None where it is not known."""
    if machine["platform"] != "cpu":
        return machine["peak_flops"], "the maker's data sheet, bfloat16"
    if preset.model.dtype != "float32":
        return None, ""
    return fastest_matmul(), "the fastest product of two 2048 x 2048 matrices, in the better of both libraries"


def compare_alone(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a batch, each contestant by itself, with all of the device's memory: two would not fit, and a step
    takes long enough for the clock to be the smaller trouble."""
    # PyTorch may take all of the memory, so that JAX may, too: by itself it would stop at three quarters.
    all_of_it = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    specs: dict[str, Row] = {OURS: {"target": TARGET, "parallel": as_chosen(machine), "environment": all_of_it}}
    row: Row = {"contestants": {}, "failed": {}}
    for name, spec in (specs | {name: THEIRS[name] for name in PYTORCH}).items():
        with Contest(needs=None) as contest:
            contest.add(name, **spec, preset=preset)
            found = time_training(contest, preset, machine, rounds)
        row = {**found, **{kind: row[kind] | found[kind] for kind in ("contestants", "failed")}}
    row["notes"].append("one contestant after the other; that all compute the same is checked at the smallest batch")
    rates = {name: found["tokens_per_second"] for name, found in row["contestants"].items()}
    if (a := rates.pop(OURS, None)) and rates:
        over = max(rates, key=lambda name: rates[name]["median"])
        b = rates[over]  # The rounds were not side by side: the extremes are those of any two.
        ratio = {"median": a["median"] / b["median"], "min": a["min"] / b["max"], "max": a["max"] / b["min"]}
        row["times_as_fast"] = {"over": over, **ratio}
    return row
