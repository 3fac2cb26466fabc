"""Training steps, side by side: python -m benchmarks train [--preset nano baby gpt2] and python -m benchmarks variants.

All contestants start with the same parameters and get the same batches. Each compiles and warms up, all must compute
the same, and then they take turns, a round of steps each, while the others wait; the first step of a turn is not timed.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import parity
from benchmarks.machine import measure
from benchmarks.presets import Preset, presets
from benchmarks.results import Results, Row, ratios, spread
from benchmarks.worker import FailedError, OutOfTimeError, Worker, take_turns
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError

OURS = "gpt_jax"
PYTORCH = ("pytorch, eager", "pytorch, compiled")
TRIES = 5
"""Batches that are tried in search of the largest one, at most."""
WARM_UP = 1_000_000
"""The first batch of the steps that are not timed; those that are have smaller numbers."""


def run(results: Results, machine: Row, rounds: int, names: tuple[str, ...] = ()) -> None:
    """Ours against PyTorch's, for each preset of the machine's platform, or those named."""
    for preset in chosen_presets(machine, names):
        results.measure(f"train/{preset.name}", describe(preset), compare_with_pytorch, preset, machine, rounds)


def run_variants(results: Results, machine: Row, rounds: int, names: tuple[str, ...] = ()) -> None:
    """Ours, as it chooses to run, against ours with other placements, loops and attentions; unless presets are named,
    in the type that the platform is fast in."""
    usual = "float32" if machine["platform"] == "cpu" else "bfloat16"
    for preset in chosen_presets(machine, names):
        if names or preset.model.dtype == usual:
            results.measure(f"variants/{preset.name}", describe(preset), compare_variants, preset, machine, rounds)


def compare_variants(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset's variants; one that comes to a program that is there already is left out."""
    workers: dict[str, Worker] = {}
    known: list[Row] = []
    try:
        for name, spec in variants(preset, machine):
            workers[name] = Worker("benchmarks.ours:Training", **spec)
            how = workers[name].ask("how")
            if how in known:
                workers.pop(name).close()
            known.append(how)
        return time_training(preset, machine, rounds, workers, None)
    finally:
        close(workers)


def run_largest(results: Results, machine: Row, rounds: int, name: str = "gpt2") -> None:
    """On a GPU: each contestant by itself, with the largest batch that its memory holds. Not in turns: two would not
    fit, and a step then takes long enough for the clock to be the smaller trouble."""
    row_name = f"train/{name}-largest-batch"
    if machine["platform"] != "gpu":
        return
    known = results.rows.get(f"train/{name}")
    if known is None:
        print(f"{row_name}: left out: train/{name} is to be measured first", flush=True)
        return
    preset = presets(machine["platform"])[name]
    results.measure(row_name, f"as train/{name}, with other batches", compare_largest, preset, known, machine, rounds)


def compare_largest(preset: Preset, known: Row, machine: Row, rounds: int) -> Row:
    """The row; known: that of the preset at its own batch. Raises FailedError when ours has no larger batch."""
    memory = measure("device_memory")
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = str(Path(folder) / "parameters.npz")
        with Worker("benchmarks.ours:Training", preset=preset.spec(), devices=1) as worker:
            worker.ask("write_parameters", path=parameters)
        # PyTorch may take all of the memory, so that JAX may, too: by itself it would stop at three quarters.
        all_of_it = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        specs: dict[str, Row] = {OURS: {"target": "benchmarks.ours:Training", "environment": all_of_it, "devices": 1}}
        for other in PYTORCH:
            compiled = other == "pytorch, compiled"
            specs[other] = {"target": "benchmarks.theirs:Training", "parameters": parameters, "compiled": compiled}
        for contestant, spec in specs.items():
            if contestant in known["contestants"]:
                guess = batch_that_fits(preset, known["contestants"][contestant]["peak_bytes"], memory)
                found = with_largest_batch(contestant, spec, preset, guess, machine, rounds)
                if isinstance(found, str):
                    failed[contestant] = found
                else:
                    rows[contestant] = found
    if OURS not in rows:
        raise FailedError(f"gpt_jax has no larger batch than {preset.batch_size}")
    batches = ", ".join(f"{name} {found['how']['batch']}" for name, found in rows.items())
    notes = [
        f"one contestant after the other, each with the largest batch that its memory holds: {batches}",
        f"that all compute the same was checked at a batch of {preset.batch_size} only",
    ]
    row = {**known, "rounds": rounds, "parity": {}, "contestants": rows, "failed": failed, "notes": notes}
    row.pop("times_as_fast", None)
    others = [other for other in PYTORCH if other in rows]
    if others:
        rates = {who: found["tokens_per_second"] for who, found in rows.items()}
        better = max(others, key=lambda other: rates[other]["median"])
        ours, theirs = rates[OURS], rates[better]
        row["times_as_fast"] = {
            "over": better,
            "median": ours["median"] / theirs["median"],
            "min": ours["min"] / theirs["max"],
            "max": ours["max"] / theirs["min"],
        }
    return row


def with_largest_batch(contestant: str, spec: Row, preset: Preset, batch: int, machine: Row, rounds: int) -> Row | str:
    """The figures with the largest batch that was found to fit, or why none larger than the preset's does.

    Begins with `batch`, goes up by a sixth where that fits, and down where it does not, until it would meet what it
    knows already.
    """
    fits, fails = preset.batch_size, math.inf
    found: Row | str = f"no batch larger than {fits} was tried: {batch} is guessed to fit"
    for _ in range(TRIES):
        if not fits < batch < fails:
            break
        larger = dataclasses.replace(preset, batch_size=batch, steps=5)
        try:
            with Worker(preset=larger.spec(), **spec) as worker:
                found, fits = time_alone(larger, machine, rounds, worker), batch
            batch = 7 * batch // 6 // 4 * 4
        except FailedError as e:
            print(f"  {contestant}: batch {batch}: {e}", flush=True)
            fails, batch = batch, 6 * batch // 7 // 4 * 4
            if isinstance(found, str):
                found = f"batch {fails}: {e}"
        except OutOfTimeError:
            if isinstance(found, str):
                raise
            break
    return found


def batch_that_fits(preset: Preset, peak_bytes: int, memory: float) -> int:
    """A guess, a multiple of 4, from the peak at the preset's batch: parameters, gradients and Adam's two moments, 16
    bytes a parameter, stay as they are, and the rest grows with the batch."""
    fixed = 16 * preset.model.n_params
    per_sequence = max(1.0, (peak_bytes - fixed) / preset.batch_size)
    return int((0.9 * memory - fixed) / per_sequence) // 4 * 4


def time_alone(preset: Preset, machine: Row, rounds: int, worker: Worker) -> Row:
    """A contestant's figures, without others. Raises FailedError."""
    first = worker.ask("seconds", first=WARM_UP, count=1)
    worker.ask("seconds", first=WARM_UP, count=preset.steps)
    seconds = [seconds_a_step(worker, turn * preset.steps, preset.steps) for turn in range(rounds)]
    how = {**worker.ask("how"), "batch": preset.batch_size}
    print(f"  batch {preset.batch_size}: {1e3 * spread(seconds)['median']:.1f} ms a step", flush=True)
    peak_bytes, held = worker.ask("peak_bytes"), worker.ask("memory")
    return figures(preset, machine, seconds, first, peak_bytes, held, how, peak(preset.model, machine)[0])


def chosen_presets(machine: Row, names: tuple[str, ...]) -> list[Preset]:
    """The presets to run. Raises UserError for a name that the platform does not have."""
    known = presets(machine["platform"])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"there is no preset {unknown[0]} on {machine['platform']}; there are {', '.join(known)}")
    return [preset for name, preset in known.items() if not names or name in names]


def describe(preset: Preset) -> str:
    """The preset in a line."""
    c = preset.model
    return (
        f"{c.n_layer} layers, {c.n_head} heads, width {c.d_model}, context {c.context_length}, "
        f"batch {preset.batch_size}, {c.n_params / 1e6:.1f} million parameters, {c.dtype}"
    )


def variants(preset: Preset, machine: Row) -> list[tuple[str, Row]]:
    """Names and arguments of our contestant: as `train.py` would have it, and each other choice by itself."""
    c = preset.model

    def spec(devices: int = default_devices(machine), **changes: Any) -> Row:
        model = dataclasses.replace(c, **changes)
        return {"preset": dataclasses.replace(preset, model=model).spec(), "devices": devices}

    n_devices = machine["cores"] if machine["platform"] == "cpu" else machine["devices"]
    attentions = {"cpu": ("xla", "block_causal"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}
    chosen = [(OURS, spec())]
    if n_devices > 1:
        chosen += [("1 device", spec(1))]
        if preset.batch_size % n_devices == 0:
            chosen += [(f"pmap, {n_devices} devices", spec(n_devices))]
    chosen += [("layers scanned" if c.unroll else "layers unrolled", spec(unroll=not c.unroll))]
    return chosen + [(f"attention {name}", spec(attention=name)) for name in attentions[machine["platform"]]]


def default_devices(machine: Row) -> int:
    """parallel.devices of our contestant: on CPU what `train.py` would choose, and one accelerator, as PyTorch has."""
    return 0 if machine["platform"] == "cpu" else 1


def compare_with_pytorch(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset. Raises as `time_training`."""
    with tempfile.TemporaryDirectory() as name:
        parameters = str(Path(name) / "parameters.npz")
        workers = {OURS: Worker("benchmarks.ours:Training", preset=preset.spec(), devices=default_devices(machine))}
        try:
            workers[OURS].ask("write_parameters", path=parameters)
            if machine["platform"] != "tpu":
                theirs: Row = {"preset": preset.spec(), "parameters": parameters}
                workers["pytorch, eager"] = Worker("benchmarks.theirs:Training", **theirs)
                workers["pytorch, compiled"] = Worker("benchmarks.theirs:Training", **theirs, compiled=True)
                if preset.hugging_face:
                    workers["transformers"] = Worker("benchmarks.theirs:HuggingFaceTraining", **theirs)
            return time_training(preset, machine, rounds, workers, Path(name))
        finally:
            close(workers)


def time_training(preset: Preset, machine: Row, rounds: int, workers: dict[str, Worker], folder: Path | None) -> Row:
    """Compiles, warms up, checks parity if there is a folder for the arrays, and times in turns.

    Raises UserError when the contestants do not compute the same, and FailedError when ours fails.
    """
    failed: dict[str, str] = {}

    def of_each(ask: Callable[[Worker], Any]) -> dict[str, Any]:
        answers = once(workers, failed, ask)
        if OURS in failed:
            raise FailedError(f"gpt_jax failed: {failed[OURS]}")
        return answers

    first_seconds = of_each(lambda worker: worker.ask("seconds", first=WARM_UP, count=1))
    of_each(lambda worker: worker.ask("seconds", first=WARM_UP, count=preset.steps))
    peak_bytes = of_each(lambda worker: worker.ask("peak_bytes"))
    held = of_each(lambda worker: worker.ask("memory"))
    how = of_each(lambda worker: worker.ask("how"))
    differences = {}
    if folder is not None:
        computed = of_each(lambda worker: parity.compute(worker, folder))
        for name in computed:
            if name != OURS:
                differences[name] = parity.compare(computed[OURS], computed[name])
                parity.check(differences[name], preset.model.dtype, f"gpt_jax and {name}")
    if differences:
        print(f"  {', '.join(differences)}: compute the same as gpt_jax", flush=True)
    peak_flops, source = peak(preset.model, machine)
    turns = iter(range(rounds * len(workers)))
    seconds = take_turns(
        workers,
        rounds,
        lambda worker: seconds_a_step(worker, 1 + next(turns) // len(workers) * preset.steps, preset.steps),
        lambda turn, name, value: print(f"  round {turn + 1}: {name:20} {1e3 * value:9.1f} ms a step", flush=True),
        failed,
    )
    if OURS not in seconds:
        raise FailedError(f"gpt_jax failed: {failed[OURS]}")
    contestants = {
        name: figures(preset, machine, values, first_seconds[name], peak_bytes[name], held[name], how[name], peak_flops)
        for name, values in seconds.items()
    }
    row: Row = {
        "preset": preset.spec(),
        "dtype": preset.model.dtype,
        "rounds": len(seconds[OURS]),
        "parity": differences,
        "flops_per_token": flops_per_token(preset.model),
        "peak_flops": peak_flops,
        "peak_source": source,
        "contestants": contestants,
        "failed": failed,
        "notes": [],
    }
    others = [name for name in PYTORCH if name in seconds]
    if others:
        better = min(others, key=lambda name: spread(seconds[name])["median"])
        row["times_as_fast"] = {"over": better, **ratios(seconds[better], seconds[OURS])}
        print(f"  gpt_jax is {row['times_as_fast']['median']:.2f} times as fast as {better}", flush=True)
    return row


def seconds_a_step(worker: Worker, first: int, count: int) -> float:
    """Seconds a step of so many, after one that is not timed: while others had their turn, the system took the caches
    and, from XLA, freed memory, which it has to find anew; training has no such pauses."""
    worker.ask("seconds", first=WARM_UP, count=1)
    return float(worker.ask("seconds", first=first, count=count))


def figures(
    preset: Preset,
    machine: Row,
    seconds: list[float],
    first: float,
    peak_bytes: int,
    held: Row,
    how: Row,
    peak_flops: float | None,
) -> Row:
    """What a contestant's rounds came to. seconds: a step's, of each round; first: the first step's, of a process;
    held: its memory, by kind."""
    rates = [preset.tokens_per_step / value for value in seconds]
    devices = 1 if machine["platform"] == "cpu" else how.get("devices", 1)
    flops = flops_per_token(preset.model)
    return {
        "how": how,
        "step_ms": spread([1e3 * value for value in seconds]),
        "tokens_per_second": spread(rates),
        "mfu": peak_flops and spread([rate * flops / (devices * peak_flops) for rate in rates]),
        "peak_bytes": peak_bytes,
        "memory": held,
        "compile_seconds": max(0.0, first - spread(seconds)["median"]),
    }


def once(workers: dict[str, Worker], failed: dict[str, str], ask: Callable[[Worker], Any]) -> dict[str, Any]:
    """An answer of each contestant."""
    return {name: answers[0] for name, answers in take_turns(workers, 1, ask, lambda *_: None, failed).items()}


def close(workers: dict[str, Worker]) -> None:
    """Ends the contestants."""
    for worker in workers.values():
        worker.close()


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs a token, as gpt_jax counts them."""
    from gpt_jax.model.flops import flops_per_token

    return flops_per_token(model)


def peak(model: ModelConfig, machine: Row) -> tuple[float | None, str]:
    """Peak FLOP/s of a device in the model's dtype, and where that is from; None where it is not known."""
    if machine["platform"] != "cpu":
        return machine["peak_flops"], "the maker's data sheet, bfloat16"
    if model.dtype != "float32":
        return None, ""
    try:
        measured = measure("matmul")
    except FailedError:
        return None, ""
    return measured, "the fastest product of two 2048 x 2048 matrices, in the better of both libraries"
