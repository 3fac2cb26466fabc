"""Fine-tuning from a published model, from the command to the export, as a user does it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.forward import forward
from gpt_jax.model.head import logits_NV
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.run.load import load_model, open_source
from gpt_jax.tokenizer.export import export_tokenizer
from gpt_jax.tokenizer.published import gguf_tokenizer
from tests.commands import records, refused_here, run, run_here
from tests.interop.models import LLAMA, publish
from tests.published import random_texts
from tests.tokenizer.test_published import byte_level_fields

SETTINGS = [
    "--model.context-length=16",
    "--model.lora.alpha=4",
    "--data.batch-size=8",
    "--data.val-fraction=0.2",
    "--optimizer.learning-rate=1e-2",
    "--optimizer.warmup-steps=2",
    "--train.log-every=1",
    "--train.checkpoint-every=4",
    "--train.steps=8",
]
LORA = ["--model.lora.rank=2", "--model.lora.dropout=0.1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published model, `model`, and a text, `text.txt`."""
    folder = tmp_path_factory.mktemp("base")
    publish(folder / "model")
    (folder / "text.txt").write_text("the cat sat on the mat and saw the rain. " * 200, encoding="utf-8")
    return folder


def train(base: Path, out: Path, *flags: str) -> str:
    printed, _ = run_here(
        "train",
        "configs/quickstart.py",
        f"--init-from={base / 'model'}",
        f"--data.source={base / 'text.txt'}",
        f"--data.dir={base / 'data'}",
        f"--out-dir={out}",
        *SETTINGS,
        *flags,
    )
    return printed


def losses(folder: Path) -> list[Any]:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in records(folder)]


@pytest.fixture(scope="module")
def adapted(base: Path) -> Path:
    """A run of eight steps with adapters."""
    train(base, base / "adapted", *LORA)
    return base / "adapted"


@pytest.mark.parametrize("flags", [[], LORA], ids=["full", "lora"])
def test_training_goes_on_from_the_published_model(base: Path, tmp_path: Path, flags: list[str]) -> None:
    """The first loss is that of the published model, not one of random weights; and the loss falls."""
    train(base, tmp_path / "run", *flags)
    by_step = {step: loss for step, loss, *_ in losses(tmp_path / "run")}
    assert by_step[8] < by_step[1] - 0.1
    evaluation = ["eval", "--data", base / "data", "--context-length=16", "--json"]
    before = json.loads(run_here(*evaluation, "--model", base / "model")[0])["loss"]
    after = json.loads(run_here(*evaluation, "--run", tmp_path / "run")[0])["loss"]
    assert before == pytest.approx(by_step[1], abs=0.3)
    assert after < before - 0.1
    assert after == pytest.approx(losses(tmp_path / "run")[-1][3], abs=1e-5)


def test_adapters_are_saved_alone(adapted: Path) -> None:
    with Checkpoints(adapted / "checkpoints", read_only=True) as checkpoints:
        names = checkpoints.meta(8)["checksums"]["params"]
    assert names
    assert all(name.rsplit("/")[-1] in ("lora_a", "lora_b") for name in names)


def test_a_resumed_run_equals_the_uninterrupted_one(base: Path, adapted: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "run", *LORA, "--train.steps=4", "--optimizer.schedule=constant")
    run_here("train", "--resume", "--out-dir", tmp_path / "run", "--train.steps=8")
    train(base, tmp_path / "whole", *LORA, "--optimizer.schedule=constant", "--train.eval-every=4")
    expected = [entry[:3] for entry in losses(tmp_path / "whole")]
    assert [entry[:3] for entry in losses(tmp_path / "run")] == expected


def test_two_devices_equal_one(base: Path, adapted: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "run", *LORA, "--parallel.devices=1")
    train(base, tmp_path / "two", *LORA, "--parallel.devices=2")
    one, two = losses(tmp_path / "run"), losses(tmp_path / "two")
    np.testing.assert_allclose([e[1] for e in two], [e[1] for e in one], atol=1e-5, rtol=0)


def test_export_and_load_again(adapted: Path, base: Path, tmp_path: Path) -> None:
    """The exported model writes what the run does; and not what the model that it began with does."""
    out = tmp_path / "exported"
    printed, _ = run("export", "--run", adapted, "--out", out)
    assert "LlamaForCausalLM" in printed
    sampling = ["--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 8, "--json"]
    texts = {
        name: json.loads(run_here("sample", *source, *sampling)[0])["tokens"]
        for name, source in {
            "run": ("--run", adapted),
            "exported": ("--model", out, "--context-length", 16),
            "base": ("--model", base / "model", "--context-length", 16),
        }.items()
    }
    assert texts["run"] == texts["exported"] != texts["base"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "LoRA adapters of rank 2" in card
    assert "| steps | 8 of 8 |" in card
    assert "exists" in refused_here("export", "--run", adapted, "--out", out)
    longer = ["--context-length", 32]
    run_here("export", "--run", adapted, "--out", out, "--force", "--dtype", "bfloat16", *longer, "--checkpoint", 4)
    assert "| steps | 4 of 8 |" in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 32
    _, params, _ = load_model(open_source(str(out)))
    rounded = np.asarray(params["tokens_VD"])
    assert np.array_equal(rounded, rounded.astype("bfloat16").astype(np.float32))


@pytest.mark.parity
def test_transformers_opens_the_export_of_adapters(adapted: Path, tmp_path: Path) -> None:
    """The same tokens, and the same logits within 1e-4."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "exported"
    run_here("export", "--run", adapted, "--out", out)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, params, tokenizer = load_model(open_source(str(adapted)))
    ids = tokenizer.encode("the cat sat on 语")
    assert transformers.AutoTokenizer.from_pretrained(out)("the cat sat on 语").input_ids == ids
    tokens = np.array([ids[:16]])
    logits = jax.jit(lambda params: logits_NV(model, params, forward(model, params, jnp.asarray(tokens))[0]))(params)
    ours = logits[:, : tokenizer.vocab_size]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parity
def test_only_tokenizers_that_qwen2_has_are_exported_with_its_architecture(base: Path, tmp_path: Path) -> None:
    """transformers takes them for Qwen2's, whatever tokenizer_config.json says."""
    transformers = pytest.importorskip("transformers")
    for pre in ("qwen2", "gpt-2"):
        folder = tmp_path / pre
        tokenizer = gguf_tokenizer(byte_level_fields(pre=pre))
        publish(folder / "model", dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, biases=("qkv",)))
        export_tokenizer(tokenizer, folder / "model", 32)
        init_from, data = f"--init-from={folder / 'model'}", f"--data.dir={folder / 'data'}"
        train(base, folder / "run", init_from, data, "--train.steps=4")
        export = ["export", "--run", folder / "run", "--out", folder / "out"]
        if pre != "qwen2":
            assert "Qwen2's architecture" in refused_here(*export)
            continue
        run_here(*export)
        theirs = transformers.AutoTokenizer.from_pretrained(folder / "out")
        assert type(theirs).__name__ == "Qwen2Tokenizer"
        for text in random_texts()[:500]:
            assert theirs(text).input_ids == tokenizer.encode(text)


def test_wrong_requests(base: Path, adapted: Path, tmp_path: Path) -> None:
    """Each is told in one line."""
    quickstart = ["train", "configs/quickstart.py", "--out-dir", tmp_path / "run"]
    assert "lora.rank" in refused_here(*quickstart, "--model.lora.rank=2")
    model = ["--init-from", base / "model"]
    assert "no folder or file" in refused_here(*quickstart, "--init-from", tmp_path / "not" / "there")
    data = tmp_path / "bytes"
    run_here("prepare", base / "text.txt", "--out", data, "--tokenizer", "bytes")
    assert "--tokenizer MODEL" in refused_here(*quickstart, *model, "--data.dir", data)
    assert "model.n_layer cannot be given" in refused_here(*quickstart, *model, "--model.n-layer=3")
    export = ["export", "--run", adapted, "--force", "--out"]
    for folder in (adapted, base / "model"):  # Nothing that a run needs is ever replaced.
        assert "choose another" in refused_here(*export, folder)
    other = tmp_path / "other"
    publish(other)
    moved = tmp_path / "moved"
    config = json.loads((adapted / "config.json").read_text())
    shutil.copytree(adapted, moved)
    (moved / "config.json").write_text(json.dumps(config | {"init_from": str(tmp_path / "gone")}))
    assert "adapters need the model" in refused_here("sample", "--run", moved)
    tensors = bytearray((other / "model.safetensors").read_bytes())
    tensors[-1] ^= 1
    (other / "model.safetensors").write_bytes(tensors)
    (moved / "config.json").write_text(json.dumps(config | {"init_from": str(other)}))
    assert "another model" in refused_here("sample", "--run", moved)
    publish(other, dataclasses.replace(LLAMA, n_layer=1))
    assert "model.n_layer is 1 there and 2 here" in refused_here("sample", "--run", moved)
