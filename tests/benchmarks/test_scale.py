"""Scaling of cost, measured on a model of next to nothing."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.measure import spread
from benchmarks.presets import Preset
from benchmarks.results import Results, Row
from gpt_jax.config import ModelConfig

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


@pytest.mark.parity
def test_rows_have_a_point_for_each_size_and_gaps_where_a_contestant_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    measured = []
    measure = scale.measure

    def counted(preset: Preset, *args: object, **options: object) -> Row:
        measured.append(preset)
        if preset.batch_size == 3:
            ours = {"step_ms": spread([2.0]), "compile_seconds": 1.0}
            return {"contestants": {scale.OURS: ours}, "failed": {scale.PYTORCH: "out of memory"}}
        return measure(preset, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scale, "measure", counted)
    results = Results(tmp_path / "machine.json", MACHINE)
    scale.run(results, MACHINE, 2, BASE, {"batch": (2, 3), "depth": (1,)})

    rows = Results(tmp_path / "machine.json", MACHINE).rows
    assert list(rows) == ["scale/batch", "scale/depth", "scale/compile"]
    (at_base, at_three), (base_again,) = rows["scale/batch"]["points"], rows["scale/depth"]["points"]
    assert at_base["x"] == 2
    assert all(
        0 < at_base[name]["min"] <= at_base[name]["median"] <= at_base[name]["max"]
        for name in (scale.OURS, scale.PYTORCH)
    )
    assert at_three == {"x": 3, "gpt_jax": {"median": 2.0, "min": 2.0, "max": 2.0}}
    assert rows["scale/batch"]["failed"] == {"pytorch at 3": "out of memory"}
    assert {**base_again, "x": 2} == at_base
    assert rows["scale/compile"]["points"][0]["scan"] > 0.01
    assert rows["scale/compile"]["points"][0]["unroll"] > 0.01
    scanned = dataclasses.replace(BASE, model=dataclasses.replace(TINY, unroll=False))
    assert measured == [BASE, dataclasses.replace(BASE, batch_size=3), scanned]


@pytest.mark.parity
def test_a_contestant_that_cannot_run_tells_why() -> None:
    pytest.importorskip("torch")
    impossible = dataclasses.replace(BASE, model=dataclasses.replace(TINY, attention="splash"))
    row = scale.measure(impossible, MACHINE, 1)
    assert row["contestants"] == {}
    assert "splash" in row["failed"]["gpt_jax"]
