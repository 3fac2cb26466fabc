"""`gpt-jax eval` as a user meets it: the numbers, and the one line that it says to what cannot be."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_jax import runtime
from gpt_jax.cli import eval as evaluate_command
from gpt_jax.cli.eval import EvalArgs, evaluate
from gpt_jax.config import ModelConfig, ParallelConfig, RopeConfig
from gpt_jax.errors import UserError
from gpt_jax.run.load import with_context
from tests.commands import ROOT, TINY, records, refused, refused_here, run, run_here
from tests.interop.models import publish


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    run_here("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={out}", "--train.steps=20", "--train.eval-every=10")
    return out


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of this process are set up already."""
    monkeypatch.setattr(runtime, "setup", lambda cpu_devices: None)
    one = runtime.local_devices()[:1]
    monkeypatch.setattr(runtime, "local_devices", lambda: one)


def evaluated(capsys: pytest.CaptureFixture[str], **args: Any) -> dict[str, Any]:
    evaluate(EvalArgs(**args, json=True))
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_as_in_training(trained: Path, tiny_data: Path) -> None:
    out, err = run("eval", "--run", trained, "--json")
    assert err == ""
    result, last = json.loads(out), records(trained)[-1]
    assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-5)
    assert result["model"] == f"{trained}, checkpoint latest"
    assert result["text"] == f"{tiny_data}, val"
    assert result["context_length"] == result["stride"] == 16
    assert run("eval", "--run", trained, "--json")[0] == out


@pytest.mark.parametrize("flags", [["--parallel.fsdp=8"], ["--parallel.fsdp=2", "--parallel.context=2"]], ids=" ".join)
def test_a_run_is_evaluated_on_a_mesh(trained: Path, flags: list[str]) -> None:
    """As in training, by the same flags: on a CPU, the mesh gets as many devices as it needs."""
    result = json.loads(run_here("eval", "--run", trained, "--json", *flags)[0])
    assert result["loss"] == pytest.approx(records(trained)[-1]["val_loss"], rel=1e-6)


def test_the_table(trained: Path, tiny_data: Path) -> None:
    out, _ = run_here("eval", "--run", trained, "--text", tiny_data.parent / "*.txt", "--stride", "4")
    names = [re.split(r"\s{2,}", line)[0] for line in out.splitlines()]
    assert names == ["model", "text", "windows", "loss", "perplexity", "bits a byte", "bits a character"]
    assert "20 documents" in out
    assert "16 tokens, 4 from one to the next" in out
    assert len({line.index(re.split(r"\s{2,}", line)[1]) for line in out.splitlines()}) == 1  # Aligned.


@pytest.mark.usefixtures("in_process")
def test_what_to_evaluate_can_be_chosen(trained: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluated(capsys, run=str(trained))
    train = evaluated(capsys, run=str(trained), split="train")
    earlier = evaluated(capsys, run=str(trained), checkpoint="10")
    shorter = evaluated(capsys, run=str(trained), context_length=5)
    overlapping = evaluated(capsys, run=str(trained), stride=1, batch_size=64)
    by_text = evaluated(capsys, run=str(trained), text=(str(tiny_data.parent / "0.txt"),))
    assert earlier["loss"] == pytest.approx(records(trained)[9]["val_loss"], rel=1e-6)
    assert len({result["loss"] for result in (whole, train, earlier, shorter, overlapping, by_text)}) == 6
    assert train["tokens"] > whole["tokens"] == earlier["tokens"] == shorter["tokens"] == overlapping["tokens"]
    assert by_text["tokens"] == by_text["bytes"] == (tiny_data.parent / "0.txt").stat().st_size
    assert by_text["characters"] < by_text["bytes"]
    assert by_text["bits_per_byte"] == pytest.approx(by_text["loss"] / math.log(2), rel=1e-9)
    assert by_text["bits_per_character"] > by_text["bits_per_byte"]


@pytest.mark.usefixtures("in_process")
def test_the_newest_run_is_the_default(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run in"):
        evaluate(EvalArgs())
    shutil.copytree(trained, tmp_path / "runs" / "mine")
    assert evaluated(capsys)["model"] == "runs/mine, checkpoint latest"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stride": 0}, "stride = 0 is not possible: it must be between 1 and context_length = 16"),
        ({"stride": 17}, "stride = 17 is not possible: it must be between 1 and context_length = 16"),
        ({"stride": 9, "context_length": 8}, "stride = 9 is not possible: it must be between 1 and context_length = 8"),
        ({"context_length": 17}, "context_length = 17 is not possible: it must be at most 16, the positions"),
        ({"context_length": -1}, "context_length = -1 is not possible: it must be 0 (the model's own) or more"),
        ({"batch_size": 0}, "batch_size = 0 is not possible: it must be 1 or more"),
        ({"checkpoint": "11"}, "there is no checkpoint 11 in"),
        ({"model": "somewhere"}, "--model names a model, and --run or --checkpoint another one; use one of them"),
        ({"run": "", "model": "m", "checkpoint": "best"}, "--model names a model, and --run or --checkpoint another"),
        ({"run": "", "model": "m"}, "--model needs a text: name it with --text, or a data folder with --data"),
        ({"run": "missing"}, "missing is not a run: it has no config.json"),
        ({"data": "missing"}, "there is no data folder missing"),
        ({"text": ("missing",)}, "there is no file or folder 'missing'"),
        ({"text": ("empty.txt",)}, "empty.txt is empty"),
        ({"text": ("one.txt",), "data": "data"}, "--text names a text, and --data another one; use one of them"),
        (
            {"parallel": ParallelConfig(fsdp=2)},
            "data x fsdp x context x tensor = 1 x 2 x 1 x 1 = 2, but there are 1 dev",
        ),
        ({"parallel": ParallelConfig(devices=2)}, "parallel.devices = 2, but this machine has 1; 0 takes all of them"),
        ({"data": "other"}, "other, val: these tokens were made by another tokenizer than the model's; name the text"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_told(
    trained: Path, tmp_path: Path, args: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("one two three " * 100)
    if args.get("data") == "other":
        run_here("prepare", tmp_path / "one.txt", "--out", tmp_path / "other", "--model-type=char")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        evaluate(EvalArgs(**{"run": str(trained), **args}))
    assert "\n" not in str(error.value)


def test_the_command_tells_it_in_one_line(trained: Path) -> None:
    assert "must be between 1 and context_length = 16" in refused_here("eval", "--run", trained, "--stride=17")
    told = refused_here("eval", "--run", trained, "--parallel.tensor=2")
    assert (
        "the vocabulary, 261, does not divide over parallel.tensor = 2; train with model.vocab_multiple = 128" in told
    )
    assert "d_model, 16, does not divide over parallel.fsdp = 3" in refused_here(
        "eval", "--run", trained, "--parallel.fsdp=3"
    )
    assert "parallel.fsdp = -1 is not possible" in refused_here("eval", "--parallel.fsdp=-1")
    assert "-m gpt_jax eval --help" in refused("eval", "--split=test", status=2)


@pytest.mark.usefixtures("in_process")
def test_a_text_of_one_token(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("a")
    result = evaluated(capsys, run=str(trained), text=(str(tmp_path / "one.txt"),))
    assert result["tokens"] == result["bytes"] == result["characters"] == result["documents"] == 1


def test_rotary_positions_take_any_context() -> None:
    rotary = ModelConfig(context_length=16, positions="rotary", rope=RopeConfig(scaling="yarn", factor=4.0))
    for context_length in (8, 64):
        config = with_context(rotary, context_length, "model")
        assert config.context_length == context_length
        assert config.rope == RopeConfig(scaling="yarn", factor=4.0, original_context=16)  # Stretched as before.


@pytest.mark.usefixtures("in_process")
def test_a_long_context_has_to_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "MOST_CONTEXT", 8)
    publish(tmp_path / "model")
    (tmp_path / "one.txt").write_text("one two three " * 10)
    args: dict[str, Any] = {"model": str(tmp_path / "model"), "text": (str(tmp_path / "one.txt"),), "json": True}
    for context_length, expected, told in ((0, 8, 1), (8, 8, 0), (32, 32, 0)):
        evaluate(EvalArgs(**args, context_length=context_length))
        out, err = capsys.readouterr()
        assert json.loads(out)["context_length"] == expected
        assert err.count("windows of 8 tokens, of the model's 32; --context-length takes more\n") == told


def test_a_missing_lm_eval_is_told() -> None:
    """As a machine without the package meets it."""
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('gpt_jax.evaluate', run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == "error: the tasks of lm_eval need the package lm_eval: pip install 'gpt-jax[lm-eval]'\n"
