"""Training that begins with another run: no export between, and the checkpoint that it began with is pinned."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt_jax.run.checksums import tree_fingerprint
from gpt_jax.run.load import load_model, open_source
from tests.commands import TINY, records, refused_here, run_here

STEPS = ["--train.steps=6", "--train.eval-every=3", "--parallel.devices=1"]


def train(data: Path, out: Path, *flags: object) -> str:
    return run_here("train", "configs/quickstart.py", f"--data.dir={data}", f"--out-dir={out}", *flags)[0]


@pytest.fixture(scope="module")
def first(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints after the third and the sixth."""
    out = tmp_path_factory.mktemp("first") / "run"
    train(tiny_data, out, *TINY, *STEPS, "--optimizer.learning-rate=3e-2", "--model.vocab-multiple=8")
    return out


def tuning(first: Path, *more: str) -> list[str]:
    """Flags of a training that begins with a run; quickstart's context is longer than that run's, so it is given."""
    flags = ["--model.context-length=16", "--data.batch-size=8", "--optimizer.warmup-steps=2", "--train.log-every=1"]
    return [f"--init-from={first}", *flags, *STEPS, *more]


def loss_on(data: Path, run: Path) -> float:
    return float(json.loads(run_here("eval", "--run", run, "--data", data, "--json")[0])["loss"])


def test_all_parameters_are_tuned_from_the_latest_checkpoint(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The first loss is the first run's, not that of random weights, and the tokenizer and the architecture are its."""
    out = tmp_path / "tuned"
    train(tiny_data, out, *tuning(first))
    assert records(out)[0]["loss"] == pytest.approx(records(first)[-1]["val_loss"], abs=0.3)
    config = json.loads((out / "config.json").read_text())
    assert config["init_from"] == str(first / "checkpoints" / "6")
    assert (config["model"]["n_layer"], config["model"]["vocab_multiple"]) == (1, 8)
    assert loss_on(tiny_data, out) < loss_on(tiny_data, first)
    run_here("export", "--run", out, "--out", tmp_path / "exported")
    assert "fine-tuned from run, all parameters" in (tmp_path / "exported" / "README.md").read_text()


def test_a_checkpoint_may_be_named_and_the_context_shortened(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    printed = train(tiny_data, out, *tuning(first / "checkpoints" / "3", "--model.context-length=8"))
    assert "the context of 16 tokens is shortened" in printed
    short, long = (load_model(open_source(str(run))) for run in (out, first))
    assert short.params["positions_TD"].shape == (8, 16)
    assert short.model.config.context_length == 8
    assert long.params["positions_TD"].shape == (16, 16)
    assert records(out)[0]["loss"] == pytest.approx(records(first)[2]["val_loss"], abs=0.3)


def test_adapters_stand_beside_the_run_that_they_began_with(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Also when that run has gone on; and a third run may begin with the two of them together."""
    out, third = tmp_path / "adapted", tmp_path / "third"
    train(tiny_data, out, *tuning(first, "--model.lora.rank=2"))
    model = load_model(open_source(str(out)))
    before = load_model(open_source(str(first / "checkpoints" / "6")))
    np.testing.assert_array_equal(model.params["tokens_VD"], before.params["tokens_VD"])
    kernels = [run.params["layers"]["attention"]["qkv"]["kernel"] for run in (model, before)]
    assert not np.array_equal(*kernels)
    sampling = ["--prompt", "the", "--temperature", 0, "--max-new-tokens", 4]
    text = run_here("sample", "--run", out, *sampling)[0]
    run_here("train", "--resume", "--out-dir", first, "--train.steps=7")
    assert run_here("sample", "--run", out, *sampling)[0] == text
    train(tiny_data, third, *tuning(out))
    assert records(third)[0]["loss"] == pytest.approx(records(out)[-1]["val_loss"], abs=0.3)


def test_a_run_is_resumed_by_what_it_began_with(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = ["--optimizer.schedule=constant", "--model.lora.rank=2"]
    train(tiny_data, whole, *tuning(first / "checkpoints" / "6", *constant))
    train(tiny_data, parts, *tuning(first / "checkpoints" / "6", *constant, "--train.steps=3"))
    run_here("train", "--resume", "--out-dir", parts, "--train.steps=6")
    one, other = (load_model(open_source(str(run))).params for run in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_adapters_of_adapters_are_resumed_on_a_mesh(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The model that they began with is known by what it was computed from: folding adapters rounds in other ways on
    other meshes. And still by its values, as earlier versions saved it."""
    base, out = tmp_path / "base", tmp_path / "run"
    train(tiny_data, base, *tuning(first, "--model.lora.rank=2"))
    train(tiny_data, out, *tuning(base, "--model.lora.rank=2", "--train.steps=3", "--optimizer.schedule=constant"))
    values = load_model(open_source(str(base))).params
    resume = ["train", "--resume", "--out-dir", out]
    run_here(*resume, "--train.steps=4", "--parallel.devices=0", "--parallel.fsdp=4")
    facts = out / "checkpoints" / "4" / "meta" / "metadata"
    before = json.loads(facts.read_text())
    facts.write_text(json.dumps(before | {"base": tree_fingerprint(values)}))
    run_here(*resume, "--train.steps=5", "--parallel.fsdp=0", "--parallel.devices=1")
    facts = out / "checkpoints" / "5" / "meta" / "metadata"
    content = json.loads(facts.read_text())
    assert content["base"] == before["base"]
    facts.write_text(json.dumps(content | {"base": "other"}))
    assert "were trained on another model than init_from now is" in refused_here(*resume, "--train.steps=6")
    assert "were trained on another model than" in refused_here("sample", "--run", out)


def test_what_cannot_be_begun_with_is_said(first: Path, tiny_data: Path, tmp_path: Path) -> None:
    new = ["train", "configs/quickstart.py", f"--data.dir={tiny_data}", "--out-dir", tmp_path / "new"]
    assert "model.n_layer cannot be given" in refused_here(*new, *tuning(first, "--model.n-layer=2"))
    assert "must be 8, with which" in refused_here(*new, *tuning(first, "--model.vocab-multiple=128"))
    longer = refused_here(*new, *tuning(first, "--model.context-length=32"))
    assert "model.context_length = 32 is not possible: it must be at most 16" in longer
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "is not a run" in refused_here(*new, *tuning(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text((first / "config.json").read_text())
    assert "there is no tokenizer in" in refused_here(*new, *tuning(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text((first / "tokenizer.json").read_text())
    assert "has no checkpoint yet" in refused_here(*new, *tuning(tmp_path / "empty"))
    assert "there is no checkpoint 4" in refused_here(*new, *tuning(first / "checkpoints" / "4"))
