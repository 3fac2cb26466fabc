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
from benchmarks.contest import Contest
from benchmarks.presets import Preset, random_tokens, small
from benchmarks.results import Results
from gpt_jax.config import DTypeName, ModelConfig
from gpt_jax.errors import UserError
from tests.commands import ROOT

pytestmark = pytest.mark.usefixtures("quick_contestants")

MACHINE: dict[str, Any] = {"platform": "cpu", "cores": 2, "devices": 1, "versions": {}, "flags": {}}
WITH_BIASES = ModelConfig(vocab_size=97, context_length=16, n_layer=2, n_head=2, d_model=32, dtype="float32")
TINY = Preset("tiny", WITH_BIASES, 4, 2, hugging_face=True)


def test_batches_are_the_same_for_all() -> None:
    tokens = random_tokens(TINY, 7)
    assert tokens.shape == (4, 17)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, random_tokens(TINY, 7))
    assert (tokens != random_tokens(TINY, 8)).any()


def test_every_choice_is_a_variant() -> None:
    assert list(train.variants(TINY, MACHINE)) == [
        *("gpt_jax", "1 device", "mesh, 1 device", "pmap, 2 devices", "mesh, 2 devices"),
        *("layers scanned", "attention xla", "attention block_causal"),
    ]
    assert "attention cudnn" in train.variants(TINY, {**MACHINE, "platform": "gpu"})
    assert "1 device" not in train.variants(TINY, {**MACHINE, "cores": 1})


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_variant_that_comes_to_the_same_program_is_left_out() -> None:
    row = train.compare_variants(dataclasses.replace(TINY, batch_size=3), MACHINE, 1)
    hows = [found["how"] for found in row["contestants"].values()]
    assert len(hows) > 2
    assert all(how not in hows[:i] for i, how in enumerate(hows))
    assert all(found["call_ms"]["median"] > 0 for found in row["contestants"].values())


def test_batches_grow_until_none_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many sequences each contestant's memory holds is made up."""
    holds = {"gpt_jax": 60, "pytorch, eager": 30, "pytorch, compiled": 20}
    rates = {"gpt_jax": (20.0, 18.0, 24.0), "pytorch, eager": (10.0, 8.0, 12.0), "pytorch, compiled": (5.0, 5.0, 5.0)}

    def timed(contest: Contest, preset: Preset, *_: object) -> dict[str, Any]:
        ((name, _),) = contest.contestants.items()
        if preset.batch_size > holds[name]:
            return {"contestants": {}, "failed": {name: "out of memory"}, "notes": ["12 layers"]}
        rate = dict(zip(("median", "min", "max"), rates[name], strict=True))
        return {"contestants": {name: {"tokens_per_second": rate}}, "failed": {}, "notes": ["12 layers"]}

    monkeypatch.setattr(train, "time_training", timed)
    monkeypatch.setattr(train, "TARGET", "tests.benchmarks.contestants:Counter")
    counter = {"target": "tests.benchmarks.contestants:Counter"}
    monkeypatch.setattr(train, "THEIRS", {name: counter for name in train.PYTORCH})  # noqa: C420
    results = Results(tmp_path / "machine.json", MACHINE)
    train.run_largest(results, MACHINE, 3)
    assert results.rows == {}
    train.run_largest(results, {**MACHINE, "platform": "gpu"}, 3)
    assert list(results.rows) == [f"train/gpt2-batch-{batch}" for batch in (24, 48, 96)]
    found = [(list(row["contestants"]), row.get("times_as_fast")) for row in results.rows.values()]
    ratio = {"over": "pytorch, eager", "median": 2.0, "min": 1.5, "max": 3.0}
    assert found == [(["gpt_jax", "pytorch, eager"], ratio), (["gpt_jax"], None), ([], None)]
    assert results.rows["train/gpt2-batch-48"]["failed"] == dict.fromkeys(train.PYTORCH, "out of memory")


def test_no_parity_is_one_line() -> None:
    ours = {"a": np.ones(3)}, [2.0, 1.0]
    theirs = {"a": np.array([1.0, 1.0, 1.001])}, [2.0, 1.0]
    differences = parity.compare(ours, theirs)
    assert differences["gradients"] == pytest.approx(1e-3 / 3**0.5, rel=1e-3)
    parity.check(differences, parity.TOLERANCES["bfloat16"], "theirs")
    with pytest.raises(UserError, match=r"gpt_jax and theirs do not compute the same.*gradients differ by 5.8e-04"):
        parity.check(differences, parity.TOLERANCES["float32"], "theirs")
    nothing = {"a": np.full(3, np.nan)}, [np.nan, 1.0]
    with pytest.raises(UserError, match="loss differ by nan"):
        parity.check(parity.compare(nothing, theirs), parity.TOLERANCES["float32"], "theirs")


def test_a_nan_or_a_gradient_of_one_side_only_is_no_parity() -> None:
    losses = [2.0, 1.0]
    ours = {"a": np.ones(3), "b": np.ones(3)}, losses
    nan = {"a": np.ones(3), "b": np.array([1.0, np.nan, 1.0])}, losses
    for pair in ((ours, nan), (nan, ours)):
        with pytest.raises(UserError, match="gradients differ by nan"):
            parity.check(parity.compare(*pair), parity.TOLERANCES["float32"], "theirs")
    fewer = {"a": np.ones(3)}, losses
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


@pytest.mark.exhaustive
@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "theirs"), [("float32", (*train.PYTORCH, "transformers")), ("bfloat16", train.PYTORCH[:1])]
)
def test_all_contestants_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DTypeName, theirs: tuple[str, ...]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = dataclasses.replace(WITH_BIASES, dtype=dtype)
    monkeypatch.setattr(train, "presets", lambda _: {"tiny": dataclasses.replace(TINY, model=model)})
    monkeypatch.setattr(train, "THEIRS", {name: train.THEIRS[name] for name in theirs})
    path = tmp_path / "machine.json"
    train.run(Results(path, MACHINE), MACHINE, 2)
    row = json.loads(path.read_text())["rows"]["train/tiny"]
    assert row["failed"] == {}
    assert set(row["contestants"]) == {"gpt_jax", *theirs}
    assert set(row["parity"]) == {*theirs}
    for found in row["contestants"].values():
        assert found["step_ms"]["min"] > 0
        assert found["peak_bytes"] > found["memory"]["libraries"] > 1e7
        assert found["memory"]["state"] >= 3 * 4 * WITH_BIASES.n_params
    assert row["times_as_fast"]["over"] in train.PYTORCH
    assert (row["peak_flops"] is None) == (dtype == "bfloat16")


def test_another_computation_is_not_timed() -> None:
    """Parameters of which one is a hundredth larger: a contest that must not take place."""
    from benchmarks.worker import Worker

    preset = Preset("tiny", small(2, 2, 32, 16, "float32"), 4, 2)
    with Worker("benchmarks.ours:Training", preset=preset) as worker:
        parameters = worker.ask("initial")
        computed = worker.ask("compute", parameters=parameters, steps=parity.STEPS)
        parameters["layers/mlp/up/kernel"] = 1.01 * parameters["layers/mlp/up/kernel"]
        others = worker.ask("compute", parameters=parameters, steps=parity.STEPS)
    with pytest.raises(UserError, match="gradients differ"):
        parity.check({"gradients": parity.compare(computed, others)["gradients"]}, parity.TOLERANCES["float32"], "they")
