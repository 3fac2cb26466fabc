"""Exports as transformers loads them, with no code of ours. Needs the extra `parity`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.export.folder import export as export_run
from gpt_jax.interop import save
from gpt_jax.interop.layout import ReadPart
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.load import RunSource, load_model, open_source
from tests.commands import ROOT, TINY, refused_here, run_here

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXT = "The cat saw 语言 and 🌧️ rain,  twice.\n\n\tThen:  x_1 = (a+b)*7;"


@pytest.fixture(scope="module", params=["bpe", "unigram", "char", "bytes"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from random weights, with a tokenizer trained on the licence and a bit of everything."""
    folder = tmp_path_factory.mktemp(request.param)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8") + TEXT * 20
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = ["--tokenizer", "bytes"] if request.param == "bytes" else ["--model-type", request.param]
    data = folder / "data"
    run_here("prepare", folder / "text.txt", "--out", data, *tokenizer, "--vocab-size", 400)
    out = folder / "run"
    run_here("train", *TINY, "--data.dir", data, "--out-dir", out, "--train.steps=20", "--optimizer.learning-rate=1e-2")
    return out


def export(trained: Path, out: Path, *flags: str) -> tuple[Any, Any]:
    run_here("export", "--run", trained, "--out", out, *flags)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(out)


def test_weights_that_are_nan_are_not_exported(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run that was saved before it diverged was made worse by hand: one line, and no folder."""

    open_params = RunSource.open_params

    def broken(source: RunSource, config: ModelConfig) -> ReadPart:
        read = open_params(source, config)
        return lambda leaf, i: read(leaf, i) * (np.nan if leaf == "final_norm/scale" else 1)

    monkeypatch.setattr(RunSource, "open_params", broken)
    told = refused_here("export", "--run", trained, "--out", tmp_path / "out")
    assert "tensor transformer.ln_f.weight has numbers that are not finite (nan or infinity)" in told
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


def test_transformers_reads_and_writes_as_we_do(trained: Path, tmp_path: Path) -> None:
    """The same tokens of a text, and the same greedy continuation of it, until the context is full."""
    model, tokenizer = export(trained, tmp_path / "exported")
    _, _, ours = load_model(open_source(str(trained)))
    assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)
    assert tokenizer.decode(ours.encode(TEXT)) == ours.decode(ours.encode(TEXT))
    prompt = "The"
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    n = 16 - tokens.shape[1]
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False)
    sampled = run_here(
        "sample", "--run", trained, "--prompt", prompt, "--temperature=0", "--max-new-tokens", n, "--json"
    )
    result = json.loads(sampled[0])
    continued = expected[0, tokens.shape[1] :].tolist()
    assert result["tokens"] == continued[: len(result["tokens"])]
    assert len(result["tokens"]) == n or continued[len(result["tokens"])] in ours.stop_ids


def test_the_card_tells_how_it_was_trained(trained: Path, tmp_path: Path) -> None:
    """Also in a folder whose name is not UTF-8."""
    out = tmp_path / os.fsdecode(b"b\xe4rd")
    run_here("export", "--run", trained, "--out", out)
    card = (out / "README.md").read_text(encoding="utf-8")
    record = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for part in ("# b?rd", "20 of 20", "learning rate 0.01", f"{record['val_loss']:.4f}", f"{record['tokens']:,}"):
        assert part in card


def test_shards(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, there are several files and an index; transformers reads the same numbers from them."""
    whole, _ = export(trained, tmp_path / "whole")
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 20_000)
    export_run(RunFolder(trained), tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    sharded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    for name, parameter in sharded.state_dict().items():
        np.testing.assert_array_equal(parameter.numpy(), whole.state_dict()[name].numpy())


def test_an_export_that_fails_leaves_what_was_there(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "out" in refused_here("export", "--run", trained, "--out", out, "--force")
    assert (out / "thesis.txt").read_text() == "mine"
    assert "out" in refused_here("export", "--run", trained)
    assert "not a run" in refused_here("export", "--run", tmp_path, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
