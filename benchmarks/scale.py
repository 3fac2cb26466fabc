"""Cost against size: python -m benchmarks scale

The time of a training step against context, batch and depth, and the time of compiling against depth, with the layers
scanned or unrolled. One of them varies, and all else stays as in the base. At each point the contestants start anew,
compile, warm up and take turns. What fails at a point, as for want of memory, leaves a gap there, with the reason.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import parity
from benchmarks.presets import Preset
from benchmarks.results import Results, Row, spread
from benchmarks.train import OURS, WARM_UP, close, default_devices, once, seconds_a_step
from benchmarks.worker import FailedError, Worker, take_turns
from gpt_jax.config import ModelConfig

PYTORCH = "pytorch"
BOTH = (OURS, PYTORCH)
SECONDS = 0.5
"""About so long is a measurement."""

CPU_BASE = Preset(
    "scale",
    ModelConfig(vocab_size=512, context_length=256, n_layer=4, n_head=4, d_model=256, bias=False, dtype="float32"),
    batch_size=4,
    steps=2,
)
CPU_AXES = {"context": (64, 128, 256, 512, 1024), "batch": (1, 2, 4, 8, 16), "depth": (1, 2, 4, 8, 16)}
BASE = Preset(
    "scale",
    ModelConfig(vocab_size=50304, context_length=1024, bias=False, dtype="bfloat16"),
    batch_size=8,
    steps=2,
)
AXES = {"context": (256, 512, 1024, 2048, 4096), "batch": (1, 2, 8, 32), "depth": (2, 6, 12, 24)}


class Point(NamedTuple):
    """What was measured at a point: seconds a step, by contestant and round; those that ours compiled; what failed."""

    seconds: dict[str, list[float]]
    compile_seconds: float | None
    failed: dict[str, str]


def run(
    results: Results,
    machine: Row,
    rounds: int,
    base: Preset | None = None,
    axes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Measures a row for each axis (context, batch, depth), and one of compile time against depth.

    base and axes: what is measured, where it is not what belongs to the machine's platform.
    """
    on_cpu = machine["platform"] == "cpu"
    base = base or (CPU_BASE if on_cpu else BASE)
    axes = axes or (CPU_AXES if on_cpu else AXES)
    measured: dict[Preset, Point] = {}  # The axes meet at the base, and unrolled layers are compiled for two of them.

    def steps(axis: str, values: Sequence[int]) -> Row:
        for preset in (at(base, axis, x) for x in values):
            if preset not in measured:
                measured[preset] = measure(preset, machine, rounds, check=preset == base)
        row = step_times(axis, {x: measured[at(base, axis, x)] for x in values})
        return {"base": base.spec(), "rounds": rounds, **row}

    def compiling() -> Row:
        compiled: dict[str, dict[int, Point]] = {}
        for name, unroll in (("scan", False), ("unroll", True)):
            by_depth = {x: at(base, "depth", x, unroll=unroll) for x in axes["depth"]}
            compiled[name] = {
                x: measured.get(preset) or measure(preset, machine, 1, alone=True) for x, preset in by_depth.items()
            }
        return {"base": base.spec(), "rounds": 1, **compile_times(compiled)}

    for axis, values in axes.items():
        results.measure(f"scale/{axis}", ", ".join(map(str, values)), steps, axis, values)
    results.measure("scale/compile", "layers scanned and unrolled, by depth", compiling)


def step_times(axis: str, measured: Mapping[int, Point]) -> Row:
    """The points of an axis, milliseconds a step, and what failed where."""
    points: list[Row] = []
    failed: dict[str, str] = {}
    for x, point in measured.items():
        times = {name: spread([1e3 * value for value in seconds]) for name, seconds in point.seconds.items()}
        points.append({"x": x, **times})
        failed |= {f"{name} at {x}": reason for name, reason in point.failed.items()}
    return {"x": axis, "points": points, "failed": failed}


def compile_times(measured: Mapping[str, Mapping[int, Point]]) -> Row:
    """The points of compile time against depth, in seconds, scanned and unrolled; and what failed where."""
    points: list[Row] = []
    failed: dict[str, str] = {}
    for x in next(iter(measured.values())):
        points.append({"x": x})
        for name, by_depth in measured.items():
            seconds = by_depth[x].compile_seconds
            if seconds is None:
                failed[f"{name} at {x}"] = by_depth[x].failed[OURS]
            else:
                points[-1][name] = seconds
    return {"x": "depth", "points": points, "failed": failed}


def at(base: Preset, axis: str, x: int, **changes: object) -> Preset:
    """The base with another context, batch or depth, and other fields of the model."""
    if axis == "batch":
        return dataclasses.replace(base, batch_size=x)
    field = {"context": "context_length", "depth": "n_layer"}[axis]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **{field: x, **changes}))  # type: ignore[arg-type]


def measure(preset: Preset, machine: Row, rounds: int, check: bool = False, alone: bool = False) -> Point:
    """A point. check: raise UserError unless both compute the same; alone: without PyTorch, as on TPU."""
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = {OURS: Worker("benchmarks.ours:Training", preset=preset.spec(), devices=default_devices(machine))}
        try:
            if not alone and machine["platform"] != "tpu":
                parameters = str(folder / "parameters.npz")
                workers[OURS].ask("write_parameters", path=parameters)
                workers[PYTORCH] = Worker("benchmarks.theirs:Training", preset=preset.spec(), parameters=parameters)
            first = once(workers, failed, lambda worker: worker.ask("seconds", first=WARM_UP, count=1))
            warm = once(workers, failed, lambda worker: worker.ask("seconds", first=WARM_UP, count=preset.steps))
            if check and len(workers) == 2:
                computed = once(workers, failed, lambda worker: parity.compute(worker, folder))
                if len(computed) == 2:
                    differences = parity.compare(computed[OURS], computed[PYTORCH])
                    parity.check(differences, preset.model.dtype, "scale: gpt_jax and pytorch")
            count = max(2, min(50, math.ceil(SECONDS / max(warm.values(), default=SECONDS))))
            seconds = take_turns(
                workers, rounds, lambda worker: seconds_a_step(worker, 1, count), lambda *_: None, failed
            )
        except FailedError as e:
            return Point({}, None, {OURS: str(e), PYTORCH: "there are no parameters to start from"})
        finally:
            close(workers)
    compiled = max(0.0, first[OURS] - spread(seconds[OURS])["median"]) if OURS in seconds else None
    c = preset.model
    size = f"{c.n_layer} layers{'' if c.unroll else ' scanned'}, context {c.context_length}, batch {preset.batch_size}"
    times = [f"{name} {1e3 * spread(values)['median']:.1f} ms" for name, values in seconds.items()]
    if compiled is not None:
        times.append(f"compiled in {compiled:.2f} s")
    print(f"  {size}: {', '.join(times)}", flush=True)
    return Point(seconds, compiled, failed)
