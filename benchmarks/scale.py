"""Cost against size: python -m benchmarks scale

The time of a training step against context, batch and depth, and the time of compiling against depth, with the layers
scanned or unrolled. One of them varies, and all else stays as in the base. At each size, which is a row of its own, the
contestants start anew, compile, warm up and take turns. One that fails there, as for want of memory, leaves a gap.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.contest import OURS, PYTORCH, Contest
from benchmarks.presets import Preset
from benchmarks.results import Results, Row
from benchmarks.train import TARGET, THEIRS, as_chosen, enter, time_training
from benchmarks.worker import FailedError
from gpt_jax.config import ModelConfig

LAYERS = {"layers scanned": False, "layers unrolled": True}
CPU_BASE = Preset(
    "scale",
    ModelConfig(vocab_size=512, context_length=256, n_layer=4, n_head=4, d_model=256, bias=False, dtype="float32"),
    batch_size=4,
    steps=None,
)
CPU_AXES = {"context": (64, 128, 256, 512, 1024), "batch": (1, 2, 4, 8, 16), "depth": (1, 2, 4, 8, 16)}
BASE = Preset("scale", ModelConfig(vocab_size=50304, context_length=1024, bias=False, dtype="bfloat16"), 8, None)
AXES = {"context": (256, 512, 1024, 2048, 4096), "batch": (1, 2, 8, 32), "depth": (2, 6, 12, 24)}

Axes = Mapping[str, Sequence[int]]


def run(results: Results, machine: Row, rounds: int, base: Preset | None = None, axes: Axes | None = None) -> None:
    """Measures a row for each size of each axis (context, batch, depth), and of compile time for each depth.

    base and axes: what is measured, where it is not what belongs to the machine's platform.
    """
    on_cpu = machine["platform"] == "cpu"
    base = base or (CPU_BASE if on_cpu else BASE)
    axes = axes or (CPU_AXES if on_cpu else AXES)
    for axis, values in axes.items():
        for x in values:
            preset = at(base, axis, x)
            results.measure(f"scale/{axis}/{x}", preset.describe(), compare_sizes, base, preset, machine, rounds)
    for x in axes["depth"]:
        results.measure(
            f"scale/compile/{x}", "layers scanned and unrolled", compare_layers, at(base, "depth", x), machine
        )


def at(base: Preset, axis: str, x: int) -> Preset:
    """The base with another context, batch or depth."""
    if axis == "batch":
        return dataclasses.replace(base, batch_size=x)
    field = {"context": "context_length", "depth": "n_layer"}[axis]
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **{field: x}))  # type: ignore[arg-type]


def compare_sizes(base: Preset, preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a size. Raises UserError unless both compute the same, which is looked at in the base."""
    row: Row = {"preset": dataclasses.asdict(preset), "contestants": {}}
    with Contest(needs=None) as contest:
        try:
            parameters = enter(contest, preset, machine, {PYTORCH[0]: THEIRS[PYTORCH[0]]})
        except FailedError as e:
            row["failed"] = {OURS: str(e), PYTORCH[0]: "there are no parameters to start from"}
        else:
            row = time_training(contest, preset, machine, rounds, parameters if preset == base else None)
        return {**row, "notes": [f"where it is not varied: {base.describe()}"]}


def compare_layers(preset: Preset, machine: Row) -> Row:
    """The row of a depth, with the layers scanned and unrolled."""
    with Contest(needs=None) as contest:
        for name, unroll in LAYERS.items():
            model = dataclasses.replace(preset.model, unroll=unroll)
            contest.add(name, TARGET, preset=dataclasses.replace(preset, model=model), parallel=as_chosen(machine))
        return time_training(contest, preset, machine, rounds=1)
