"""A run, a run of adapters and a data folder that version 0.1.0 saved: they sample, evaluate, resume and export as
they did. The archive holds them, the model that the adapters began with, and what 0.1.0's commands printed of them."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.commands import records, run_here

SAMPLING = ["--temperature", 0, "--max-new-tokens", 8, "--json", "--prompt", "the"]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).with_name("saved_by_0.1.0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def moved(saved: Path, run: str, **values: Any) -> Path:
    """The run, its configuration changed to where the files are now."""
    path = saved / run / "config.json"
    config = json.loads(path.read_text())
    assert "format_version" not in config
    config["data"]["dir"] = str(saved / "data")
    path.write_text(json.dumps(config | values))
    return saved / run


def expected(saved: Path, name: str) -> dict[str, Any]:
    return json.loads((saved / f"expected_{name}.json").read_text())


def assert_same_sample(printed: str, before: dict[str, Any]) -> None:
    """The same tokens, and log-probabilities within 1e-5 nats; there may be more fields."""
    now = json.loads(printed)
    assert now["logprobs"] == pytest.approx(before["logprobs"], abs=1e-5)
    assert {**now, **before, "logprobs": 0} == {**now, "logprobs": 0}


def test_a_run_samples_and_is_evaluated(saved: Path) -> None:
    run = moved(saved, "run")
    assert_same_sample(run_here("sample", "--run", run, *SAMPLING)[0], expected(saved, "run"))
    now, before = json.loads(run_here("eval", "--run", run, "--json")[0]), expected(saved, "eval")
    assert now["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert [now[name] for name in ("tokens", "documents", "bytes")] == [
        before[name] for name in ("tokens", "documents", "bytes")
    ]


@pytest.mark.parametrize("attention", ["cudnn", "splash"])
def test_a_run_that_asked_for_another_devices_attention_is_loaded(saved: Path, attention: str) -> None:
    """It was trained where that runs, and samples everywhere."""
    path = moved(saved, "run") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | {"attention": attention}}))
    assert_same_sample(run_here("sample", "--run", path.parent, *SAMPLING)[0], expected(saved, "run"))


def test_adapters_sample(saved: Path) -> None:
    run = moved(saved, "adapters", init_from=str(saved / "published"))
    assert_same_sample(run_here("sample", "--run", run, *SAMPLING)[0], expected(saved, "adapters"))


def test_a_run_is_resumed(saved: Path) -> None:
    """Six steps, of which 0.1.0 took the first four: losses within 1e-5 of those of its own fifth and sixth."""
    run = moved(saved, "run")
    run_here("train", "--resume", "--out-dir", run, "--train.steps=6", "--optimizer.schedule=constant")
    before = [json.loads(line) for line in (saved / "expected_resumed.jsonl").read_text().splitlines()]
    for ours, theirs in zip(records(run), before, strict=True):
        assert ours.keys() - {"epoch"} == theirs.keys()  # Which 0.1.0 did not tell.
        for name in theirs.keys() - {"tokens_per_second", "step_ms", "mfu"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert json.loads((run / "config.json").read_text())["format_version"] >= 1


def test_a_run_is_exported(saved: Path) -> None:
    run, out = moved(saved, "run"), saved / "exported"
    run_here("export", "--run", run, "--out", out)
    printed = run_here("sample", "--model", out, "--context-length", 16, *SAMPLING)[0]
    assert_same_sample(printed, expected(saved, "run"))
