"""`gpt_jax.load` and `gpt_jax.train`, as a program uses them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt_jax
from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.model.forward import forward
from gpt_jax.model.head import logits_NV
from tests.commands import ROOT, records, run
from tests.interop.models import publish


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mine"
    config = Config(
        out_dir=str(out),
        model=ModelConfig(n_layer=1, n_head=2, d_model=16, context_length=16),
        data=DataConfig(dir=str(tiny_data), batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=8, log_every=1),
        parallel=ParallelConfig(devices=1),
    )
    assert gpt_jax.train(config) == out
    return out


def test_a_run_trained_from_python_is_a_run(trained: Path) -> None:
    assert [r["step"] for r in records(trained)] == list(range(1, 9))
    printed, _ = run("sample", "--run", trained, "--prompt", "the", "--max-new-tokens", 4, "--temperature", 0)
    model = gpt_jax.load(trained)
    assert printed == f"the{model.generate('the', max_new_tokens=4, temperature=0.0).text}\n"
    assert gpt_jax.load(trained, checkpoint="best").config == model.config


def test_it_goes_on_when_it_is_asked_to(trained: Path) -> None:
    config = gpt_jax.run.folder.RunFolder(trained).load_config()
    with pytest.raises(UserError, match="holds a run already"):
        gpt_jax.train(config)
    gpt_jax.train(config, resume=True)
    assert len(records(trained)) == 8


def test_generation_takes_one_prompt_or_several(trained: Path) -> None:
    model = gpt_jax.load(str(trained))
    one = model.generate("the cat", max_new_tokens=5, seed=3)
    both = model.generate(["the cat", "语言"], max_new_tokens=5, seed=3)
    assert both[0].text == one.text
    assert len(both) == 2
    assert len(one.tokens) == len(one.logprobs) == 5


def test_scores_and_logits_agree_with_the_model(trained: Path) -> None:
    """The loss of a text from all its logits, computed here, to 1e-5; and the logits from the model's own functions."""
    model = gpt_jax.load(trained)
    text = "the cat sat"
    ids = [model.tokenizer.end_of_text, *model.tokenizer.encode(text)]
    logits_TV = model.logits(ids[:-1])
    assert logits_TV.shape == (len(ids) - 1, model.tokenizer.vocab_size)
    log_probabilities = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    expected = -np.mean([row[target] for row, target in zip(log_probabilities, ids[1:], strict=True)])
    score = model.score(text)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert score.tokens == len(ids) - 1
    hidden = forward(model.model, model.params, jnp.array([ids[:-1]]))[0]
    np.testing.assert_allclose(logits_TV, logits_NV(model.model, model.params, hidden), atol=1e-5, rtol=0)
    assert model.score([text, text]).nats == pytest.approx(2 * score.nats, rel=1e-6)


def test_a_notebook_that_computes_in_float64_gets_the_same(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """And keeps its own settings of JAX."""
    config = gpt_jax.run.folder.RunFolder(trained).load_config()

    def results() -> list[object]:
        model = gpt_jax.load(trained)
        drawn = model.generate("the cat", max_new_tokens=5, seed=3)
        return [drawn.tokens, drawn.logprobs, model.score("the cat sat").nats, model.logits("the cat").tolist()]

    before = results()
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.default_prng_impl("rbg"):
        assert results() == before
        gpt_jax.train(dataclasses.replace(config, out_dir=str(tmp_path / "again")))
        assert jnp.zeros(1).dtype == jnp.float64
    losses, again = ([r["loss"] for r in records(run)] for run in (trained, tmp_path / "again"))
    assert again == losses


def test_a_published_model_answers(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    model = gpt_jax.load(tmp_path / "model")
    with pytest.raises(UserError, match="no chat template"):
        model.chat("Hello")
    assert model.config.context_length == 32
    assert gpt_jax.load(tmp_path / "model", context_length=16).config.context_length == 16


def test_what_cannot_be_is_said(trained: Path, tmp_path: Path) -> None:
    model = gpt_jax.load(trained)
    with pytest.raises(UserError, match="there is no setting tempreature; there are alternatives, frequency_pen"):
        model.generate("the", tempreature=1.0)
    with pytest.raises(UserError, match="temperature = -1"):
        model.generate("the", temperature=-1)
    with pytest.raises(UserError, match="there are 17 tokens, and the model reads 1 to 16"):
        model.logits([1] * 17)
    with pytest.raises(UserError, match="out_dir is empty"):
        gpt_jax.train(Config())
    with pytest.raises(UserError, match="no folder or file"):
        gpt_jax.load(tmp_path / "nothing" / "here")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        gpt_jax.lode  # noqa: B018


def test_fields_that_a_model_decides_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    config = Config(out_dir=str(tmp_path / "run"), init_from=str(tmp_path / "model"), model=ModelConfig(n_layer=5))
    with pytest.raises(UserError, match=r"model\.n_layer cannot be given with init_from"):
        gpt_jax.train(config)


def test_importing_starts_nothing() -> None:
    """In a fresh interpreter: no JAX, and the sub-package `train` is there to be called and imported from."""
    code = """
import sys, gpt_jax
assert "jax" not in sys.modules and "flax" not in sys.modules, "JAX"
assert callable(gpt_jax.train) and callable(gpt_jax.load)
from gpt_jax import train
assert callable(train) and "jax" not in sys.modules
from gpt_jax.train.optimizer import make_optimizer
assert callable(gpt_jax.train), "shadowed"
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "devices"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_changes_no_setting_of_the_program_around() -> None:
    """Nor does importing all modules: no level of a log, hook, handler, filter, variable or setting of JAX."""
    code = """
import importlib, logging, os, pkgutil, signal, sys, warnings
import filelock, flax.linen, jax, optax, orbax.checkpoint, sentencepiece, tqdm, tyro
import gpt_jax

def settings():
    levels = [logging.getLogger(name).level for name in ("", "absl", "asyncio", "jax", "huggingface_hub", "tokenizers")]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    hooks = [sys.unraisablehook, sys.excepthook]
    return levels, handlers, hooks, dict(os.environ), list(warnings.filters), dict(jax.config.values)

for posix in ("fcntl", "resource", "termios", "pwd", "grp"):  # Which Windows does not have.
    sys.modules[posix] = None
before = settings()
for module in pkgutil.walk_packages(gpt_jax.__path__, "gpt_jax."):
    if "evaluate." not in module.name and not module.name.endswith("__main__"):  # lm_eval is another matter.
        importlib.import_module(module.name)
for a, b in zip(before, settings()):
    assert a == b, (a, b)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jax_that_was_started_before_is_told() -> None:
    code = "import jax; jax.devices(); from gpt_jax import runtime; runtime.setup_once(2); runtime.setup_once(2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("JAX was started before gpt_jax") == 1
