"""Scaling of cost, measured on a model of next to nothing."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.presets import Preset
from benchmarks.results import Results
from gpt_jax.config import ModelConfig

pytestmark = pytest.mark.usefixtures("quick_contestants")

TINY = ModelConfig(
    vocab_size=16, context_length=8, n_layer=1, n_head=1, d_model=8, bias=False, dtype="float32", attention="xla"
)
BASE = Preset("scale", TINY, batch_size=2, steps=None)
MACHINE = {"platform": "cpu", "cores": 1, "devices": 1, "versions": {}, "flags": {}}


@pytest.mark.parametrize("axis", ["context", "batch", "depth"])
def test_only_the_axis_varies(axis: str) -> None:
    varied = scale.at(BASE, axis, 3)
    back = {"context": 8, "batch": 2, "depth": 1}[axis]
    assert varied != BASE
    assert scale.at(varied, axis, back) == BASE


@pytest.mark.parametrize(("base", "axes"), [(scale.CPU_BASE, scale.CPU_AXES), (scale.BASE, scale.AXES)])
def test_the_axes_meet_at_the_base(base: Preset, axes: dict[str, tuple[int, ...]]) -> None:
    assert all(sum(scale.at(base, axis, x) == base for x in values) == 1 for axis, values in axes.items())


@pytest.mark.exhaustive
@pytest.mark.parity
def test_each_size_is_a_row_with_both_contestants(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    results = Results(tmp_path / "machine.json", MACHINE)
    scale.run(results, MACHINE, 2, BASE, {"batch": (3,), "depth": (1,)})
    rows = Results(tmp_path / "machine.json", MACHINE).rows
    assert list(rows) == ["scale/batch/3", "scale/depth/1", "scale/compile/1"]
    for name, row in rows.items():
        both = scale.LAYERS if name == "scale/compile/1" else (scale.OURS, scale.PYTORCH[0])
        assert (row["failed"], set(row["contestants"])) == ({}, set(both))
        for found in row["contestants"].values():
            assert 0 < found["step_ms"]["min"] <= found["step_ms"]["median"] <= found["step_ms"]["max"]
    assert [row["preset"]["batch_size"] for row in rows.values()] == [3, 2, 2]
    assert all(found["compile_seconds"] > 0.01 for found in rows["scale/compile/1"]["contestants"].values())
    assert [bool(row["parity"]) for row in rows.values()] == [False, True, False]


@pytest.mark.parity
def test_a_contestant_that_cannot_run_tells_why() -> None:
    pytest.importorskip("torch")
    impossible = dataclasses.replace(BASE, model=dataclasses.replace(TINY, attention="splash"))
    row = scale.compare_sizes(BASE, impossible, MACHINE, 1)
    assert row["contestants"] == {}
    assert "splash" in row["failed"]["gpt_jax"]
    assert "there are no parameters" in row["failed"]["pytorch, eager"]
