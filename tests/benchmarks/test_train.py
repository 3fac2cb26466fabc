"""The benchmark of training: both sides compute the same, and one that does not is not timed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import parity, train
from benchmarks.presets import Preset, from_spec, presets, random_tokens, small
from benchmarks.results import Results
from benchmarks.worker import FailedError
from gpt_jax.config import DTypeName, ModelConfig
from gpt_jax.errors import UserError
from tests.commands import ROOT

MACHINE: dict[str, Any] = {"platform": "cpu", "cores": 2, "devices": 1, "versions": {}, "flags": {}}
WITH_BIASES = ModelConfig(vocab_size=97, context_length=16, n_layer=2, n_head=2, d_model=32, dtype="float32")
TINY = Preset("tiny", WITH_BIASES, 4, 2, hugging_face=True)


def test_presets_survive_json() -> None:
    for platform in ("cpu", "gpu", "tpu"):
        for preset in presets(platform).values():
            assert from_spec(json.loads(json.dumps(preset.spec()))) == preset


def test_batches_are_the_same_for_all() -> None:
    tokens = random_tokens(TINY, 7)
    assert tokens.shape == (4, 17)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, random_tokens(TINY, 7))
    assert (tokens != random_tokens(TINY, 8)).any()


def test_every_choice_is_a_variant() -> None:
    names = [name for name, _ in train.variants(TINY, MACHINE)]
    assert names == [
        *("gpt_jax", "1 device", "mesh, 1 device", "pmap, 2 devices", "mesh, 2 devices"),
        *("layers scanned", "attention xla", "attention block_causal"),
    ]
    assert "attention cudnn" in [name for name, _ in train.variants(TINY, {**MACHINE, "platform": "gpu"})]


@pytest.mark.slow
def test_a_variant_that_comes_to_the_same_program_is_left_out() -> None:
    row = train.compare_variants(dataclasses.replace(TINY, batch_size=3), MACHINE, 1)
    hows = [found["how"] for found in row["contestants"].values()]
    assert len(hows) > 2
    assert all(how not in hows[:i] for i, how in enumerate(hows))


@pytest.mark.parametrize(("holds", "largest"), [(20, 20), (23, 20), (40, 40), (16, 16), (12, None)])
def test_the_largest_batch_is_looked_for_in_both_directions(
    monkeypatch: pytest.MonkeyPatch, holds: int, largest: int | None
) -> None:
    """From a preset's batch of 12 and a guess of 24; how many the memory holds is made up."""

    def alone(_: str, spec: dict[str, Any], preset: Preset, *__: object) -> dict[str, Any]:
        if preset.batch_size > holds:
            raise FailedError("out of memory")
        return {"how": {"batch": preset.batch_size}}

    monkeypatch.setattr(train, "time_alone", alone)
    spec = {"target": "tests.benchmarks.contestants:Counter"}
    preset = dataclasses.replace(TINY, batch_size=12)
    found = train.with_largest_batch("gpt_jax", spec, preset, 24, MACHINE, 1)
    assert found == ("batch 16: out of memory" if largest is None else {"how": {"batch": largest}})


def test_no_parity_is_one_line() -> None:
    ours = parity.Computed({"a": np.ones(3)}, np.array([2.0, 1.0]))
    theirs = parity.Computed({"a": np.array([1.0, 1.0, 1.001])}, np.array([2.0, 1.0]))
    differences = parity.compare(ours, theirs)
    assert differences["gradients"] == pytest.approx(1e-3 / 3**0.5, rel=1e-3)
    parity.check(differences, "bfloat16", "ours and theirs")
    with pytest.raises(UserError, match=r"ours and theirs do not compute the same.*gradients differ by 5.8e-04"):
        parity.check(differences, "float32", "ours and theirs")
    nothing = parity.Computed({"a": np.full(3, np.nan)}, np.array([np.nan, 1.0]))
    with pytest.raises(UserError, match="loss differ by nan"):
        parity.check(parity.compare(nothing, theirs), "float32", "ours and theirs")


def test_a_nan_or_a_gradient_of_one_side_only_is_no_parity() -> None:
    losses = np.array([2.0, 1.0])
    ours = parity.Computed({"a": np.ones(3), "b": np.ones(3)}, losses)
    nan = parity.Computed({"a": np.ones(3), "b": np.array([1.0, np.nan, 1.0])}, losses)
    for pair in ((ours, nan), (nan, ours)):
        with pytest.raises(UserError, match="gradients differ by nan"):
            parity.check(parity.compare(*pair), "float32", "ours and theirs")
    fewer = parity.Computed({"a": np.ones(3)}, losses)
    for pair in ((ours, fewer), (fewer, ours)):
        with pytest.raises(UserError, match="only one of the two has gradients of b"):
            parity.compare(*pair)


def test_an_unknown_preset_or_part_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no preset huge on cpu; there are nano, baby"):
        train.chosen_presets(MACHINE, ("huge",))
    command = [sys.executable, "-m", "benchmarks", "trian", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no part trian; there are train, decode")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_contestants_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DTypeName) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = dataclasses.replace(WITH_BIASES, dtype=dtype)
    monkeypatch.setattr(train, "presets", lambda _: {"tiny": dataclasses.replace(TINY, model=model)})
    path = tmp_path / "machine.json"
    train.run(Results(path, MACHINE), MACHINE, 2)
    row = json.loads(path.read_text())["rows"]["train/tiny"]
    assert row["failed"] == {}
    assert set(row["contestants"]) == {"gpt_jax", *train.PYTORCH, "transformers"}
    assert set(row["parity"]) == {*train.PYTORCH, "transformers"}
    for found in row["contestants"].values():
        assert found["step_ms"]["min"] > 0
        assert found["peak_bytes"] > found["memory"]["libraries"] > 1e7
        assert found["memory"]["state"] >= 3 * 4 * WITH_BIASES.n_params
    assert row["times_as_fast"]["over"] in train.PYTORCH
    assert (row["peak_flops"] is None) == (dtype == "bfloat16")


@pytest.mark.parity
@pytest.mark.slow
def test_another_computation_is_not_timed(tmp_path: Path) -> None:
    """An untied head, or other parameters, on one side only: a contest that must not take place."""
    pytest.importorskip("torch")
    from benchmarks.worker import Worker

    preset = Preset("tiny", small(2, 2, 32, 16, "float32"), 4, 2)
    parameters = str(tmp_path / "parameters.npz")
    with Worker("benchmarks.ours:Training", preset=preset.spec()) as ours:
        ours.ask("write_parameters", path=parameters)
        computed = parity.compute(ours, tmp_path)
    with np.load(parameters) as file:
        arrays = dict(file)
    arrays["layers/mlp/up/kernel"] *= 1.01
    np.savez(parameters, **arrays)
    with Worker("benchmarks.theirs:Training", preset=preset.spec(), parameters=parameters) as theirs:
        differences = parity.compare(computed, parity.compute(theirs, tmp_path))
    with pytest.raises(UserError, match="gradients differ"):
        parity.check({"gradients": differences["gradients"]}, "float32", "they")
