"""Cost against size: python -m benchmarks scale

The time of a training step against context, batch and depth, and the time of compiling against depth, with the layers
scanned or unrolled. One of them varies, and all else stays as in the base. At each point the contestants start anew,
compile, warm up and take turns. What fails at a point, as for want of memory, leaves a gap there, with the reason.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.contest import OURS, Contest
from benchmarks.presets import Preset
from benchmarks.results import Results, Row
from benchmarks.train import THEIRS, enter, time_training
from benchmarks.worker import FailedError
from gpt_jax.config import ModelConfig

PYTORCH = "pytorch"
CPU_BASE = Preset(
    "scale",
    ModelConfig(vocab_size=512, context_length=256, n_layer=4, n_head=4, d_model=256, bias=False, dtype="float32"),
    batch_size=4,
    steps=None,
)
CPU_AXES = {"context": (64, 128, 256, 512, 1024), "batch": (1, 2, 4, 8, 16), "depth": (1, 2, 4, 8, 16)}
BASE = Preset("scale", ModelConfig(vocab_size=50304, context_length=1024, bias=False, dtype="bfloat16"), 8, None)
AXES = {"context": (256, 512, 1024, 2048, 4096), "batch": (1, 2, 8, 32), "depth": (2, 6, 12, 24)}


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
    measured: dict[Preset, Row] = {}  # The axes meet at the base, and unrolled layers are compiled for two of them.

    def steps(axis: str, values: Sequence[int]) -> Row:
        points: list[Row] = []
        failed: dict[str, str] = {}
        for x in values:
            preset = at(base, axis, x)
            if preset not in measured:
                measured[preset] = measure(preset, machine, rounds, check=preset == base)
            row = measured[preset]
            points.append({"x": x, **{name: found["step_ms"] for name, found in row["contestants"].items()}})
            failed |= {f"{name} at {x}": reason for name, reason in row["failed"].items()}
        return {"base": base.spec(), "rounds": rounds, "x": axis, "points": points, "failed": failed}

    def compiling() -> Row:
        points: list[Row] = [{"x": x} for x in axes["depth"]]
        failed: dict[str, str] = {}
        for name, unroll in (("scan", False), ("unroll", True)):
            for point in points:
                preset = at(base, "depth", point["x"], unroll=unroll)
                row = measured.get(preset) or measure(preset, machine, 1, alone=True)
                if OURS in row["contestants"]:
                    point[name] = row["contestants"][OURS]["compile_seconds"]
                else:
                    failed[f"{name} at {point['x']}"] = row["failed"][OURS]
        return {"base": base.spec(), "rounds": 1, "x": "depth", "points": points, "failed": failed}

    for axis, values in axes.items():
        results.measure(f"scale/{axis}", ", ".join(map(str, values)), steps, axis, values)
    results.measure("scale/compile", "layers scanned and unrolled, by depth", compiling)


def at(base: Preset, axis: str, x: int, **changes: object) -> Preset:
    """The base with another context, batch or depth, and other fields of the model."""
    if axis == "batch":
        return dataclasses.replace(base, batch_size=x)
    field = {"context": "context_length", "depth": "n_layer"}[axis]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **{field: x, **changes}))  # type: ignore[arg-type]


def measure(preset: Preset, machine: Row, rounds: int, check: bool = False, alone: bool = False) -> Row:
    """A point, as a row of training. check: raise UserError unless both compute the same; alone: without PyTorch."""
    print(f"  {preset.describe()}{'' if preset.model.unroll else ', layers scanned'}", flush=True)
    theirs = {} if alone else {PYTORCH: THEIRS["pytorch, eager"]}
    with tempfile.TemporaryDirectory() as folder, Contest(needs=None) as contest:
        try:
            enter(contest, preset, machine, Path(folder), theirs)
        except FailedError as e:
            return {"contestants": {}, "failed": {OURS: str(e), PYTORCH: "there are no parameters to start from"}}
        return time_training(contest, preset, machine, rounds, Path(folder) if check else None)
