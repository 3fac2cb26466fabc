"""Adapters of several runs are loaded together, and compared with the model that they are for."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gpt_jax.config import LoraConfig
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT
from gpt_jax.model.lora import Adapters, split
from gpt_jax.run.adapters import load_adapters
from gpt_jax.run.checksums import tree_fingerprint
from gpt_jax.run.load import load_model, open_source
from gpt_jax.sample.engine import Engine, Request
from gpt_jax.sample.settings import Filters
from tests import tiny
from tests.commands import TINY, run_here
from tests.export.test_streaming import save_adapters, save_run
from tests.interop.models import publish
from tests.sample.engines import Answers

RUNS = {"one": LoraConfig(rank=2, alpha=3.0), "other": LoraConfig(rank=3, targets=("qkv", "up"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, two runs of adapters on it, and adapters on those of the first, once by an earlier version."""
    folder = tmp_path_factory.mktemp("runs")
    model = dataclasses.replace(tiny.GPT2, vocab_size=261)
    save_run(folder / "base", model, tiny.random_params(model))
    for name, lora in RUNS.items():
        save_adapters(folder / name, folder / "base", lora)
    save_adapters(folder / "twice", folder / "one", RUNS["other"])
    save_adapters(folder / "twice_before", folder / "one", RUNS["other"], lambda _, params: tree_fingerprint(params))
    return folder


def logprobs(model: GPT, params: Any, adapters: Adapters | None = None, adapter: int = 0) -> list[float]:
    [answer] = Answers(Engine(model, params, 2, adapters=adapters)).all(
        [Request([1, 2, 3], 5, Filters(logit_bias=((7, 100.0),)), seed=(1, 2, 3), adapter=adapter)]
    )
    return answer[1]


def refused(base: Path, *names: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_adapters(open_source(str(base)), list(map(str, names)))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_adapters_from_training(tiny_data: Path, tmp_path: Path) -> None:
    """Those of two runs, of which each writes as it does when it is loaded alone, beside int8, too."""
    base = tmp_path / "base"
    train = ["train", "configs/quickstart.py", f"--data.dir={tiny_data}", "--train.steps=3", "--train.eval-every=0"]
    run_here(*train, *TINY, f"--out-dir={base}")
    tuning = [f"--init-from={base}", "--model.context-length=16", "--data.batch-size=8", "--optimizer.warmup-steps=1"]
    tuning += ["--optimizer.learning-rate=0.1", "--parallel.devices=1"]
    run_here(*train, *tuning, "--model.lora.rank=2", f"--out-dir={tmp_path / 'a'}")
    more = ["--model.lora.rank=3", "--model.lora.alpha=6", "--model.lora.targets", "out", "down"]
    run_here(*train, *tuning, *more, f"--out-dir={tmp_path / 'b'}")
    names = [str(tmp_path / name) for name in ("a", "b")]
    adapters, tokenizers = load_adapters(open_source(str(base)), names)
    assert [t.fingerprint for t in tokenizers] == [open_source(name).tokenizer().fingerprint for name in names]
    exact, int8 = (load_model(open_source(str(base)), quantize=quantize) for quantize in ("none", "int8"))
    ours = [logprobs(*exact[:2], adapters, n) for n in range(3)]
    for number, name in enumerate([str(base), *names]):
        np.testing.assert_allclose(ours[number], logprobs(*load_model(open_source(name))[:2]), atol=1e-5)
        np.testing.assert_allclose(ours[number], logprobs(*int8[:2], adapters, number), atol=0.02)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(np.subtract(ours[one], ours[other])).max() > 0.05


def test_the_model_may_be_a_run_with_adapters(runs: Path) -> None:
    base = open_source(str(runs / "one"))
    adapters, _ = load_adapters(base, [str(runs / "twice"), str(runs / "twice_before" / "checkpoints" / "1")])
    expected = np.array([[0, 0], [16 / 3, 0], [0, 16 / 3]], np.float32).repeat(3, axis=1)
    np.testing.assert_array_equal(adapters.scales_AR, expected)
    assert "were trained on" in refused(runs / "base", runs / "twice")
    assert "were trained on" in refused(runs / "twice", runs / "one")


def test_the_model_is_known_by_its_values(runs: Path, tmp_path: Path) -> None:
    """Wherever it is: it is read where the server reads it, a part at a time, and not where it was in training."""
    moved = shutil.copytree(runs / "base", tmp_path / "moved")
    adapters, _ = load_adapters(open_source(str(moved)), [str(runs / name) for name in RUNS])
    assert [adapters.n, adapters.scales_AR.shape] == [2, (3, 5)]
    assert {x.dtype for x in jax.tree.leaves(adapters.layers)} == {np.dtype(np.float32)}


def test_what_are_no_adapters_of_the_model(runs: Path, tmp_path: Path) -> None:
    base = runs / "base"
    assert "base has no adapters: it is not a run that" in refused(base, runs / "one", base)
    publish(tmp_path / "published", dataclasses.replace(tiny.GPT2, vocab_size=261))
    assert "published has no adapters: it is not a run that" in refused(base, tmp_path / "published")
    assert "missing" in refused(base, tmp_path / "missing")
    assert "were trained with another tokenizer than" in refused(tmp_path / "published", runs / "one")

    params = tiny.random_params(dataclasses.replace(tiny.GPT2, vocab_size=261))
    params["final_norm"]["bias"] = params["final_norm"]["bias"].at[3].add(1e-3)
    save_run(tmp_path / "changed", dataclasses.replace(tiny.GPT2, vocab_size=261), params)
    message = refused(tmp_path / "changed", runs / "one")
    assert f"one were trained on {base}/checkpoints/1, and {tmp_path}/changed has other values" in message
    deeper = dataclasses.replace(tiny.GPT2, vocab_size=261, n_layer=1)
    save_run(tmp_path / "deeper", deeper, tiny.random_params(deeper))
    message = refused(tmp_path / "deeper", runs / "one")
    assert "one were trained on another model" in message
    assert "model.n_layer is 1 there and 2 here" in message


def test_damaged_adapters(runs: Path, tmp_path: Path) -> None:
    source = open_source(str(runs / "one"))
    saved = source.saved.model  # type: ignore[attr-defined]
    [checkpoint] = (runs / "one" / "checkpoints").glob("1")
    meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    broken = shutil.copytree(runs / "one", tmp_path / "broken")
    facts = broken / "checkpoints" / "1" / "meta" / "metadata"
    sums = {name: value ^ 1 for name, value in meta["checksums"]["params"].items()}
    facts.write_text(json.dumps(meta | {"checksums": meta["checksums"] | {"params": sums}}))
    assert "is damaged" in refused(runs / "base", broken)
    adapters = jax.tree.map(lambda x: x.at[0, 0, 0].set(np.nan), split(tiny.random_params(saved))[0])
    save_run(tmp_path / "nan", saved, adapters, str(runs / "base"), meta["base"])
    assert "nan have values that are no numbers" in refused(runs / "base", tmp_path / "nan")
