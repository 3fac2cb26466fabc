"""A model that is given another context than its own is resolved for that one: here for a TPU, whose Splash attention
takes whole blocks only."""

import dataclasses
import json
from pathlib import Path

import pytest

from gpt_jax import runtime
from gpt_jax.config import Config, ModelConfig
from gpt_jax.model.backend import resolve
from gpt_jax.plan.planner import Planner
from gpt_jax.plan.targets import parse_target
from gpt_jax.run.load import adopt, load_model, open_source
from gpt_jax.runtime import Hardware
from tests.commands import run_here
from tests.interop.models import publish

CONTEXTS = [(128, "splash"), (1000, "xla"), (1024, "splash"), (1025, "xla")]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rotary positions and a context of 32 tokens."""
    folder = tmp_path_factory.mktemp("published")
    publish(folder)
    return folder


@pytest.mark.parametrize(("context", "attention"), [(0, "xla"), *CONTEXTS])
def test_what_is_loaded(published: Path, monkeypatch: pytest.MonkeyPatch, context: int, attention: str) -> None:
    monkeypatch.setattr(runtime, "hardware", lambda device: Hardware("tpu"))
    config = load_model(open_source(str(published)), context).model.config
    assert (config.context_length, config.attention) == (context or 32, attention)


@pytest.mark.parametrize(("context", "attention"), CONTEXTS)
def test_what_training_begins_with_and_what_is_planned(published: Path, context: int, attention: str) -> None:
    model = adopt(open_source(str(published)), ModelConfig(context_length=context))
    assert resolve(model, "tpu").attention == attention
    planner = Planner(dataclasses.replace(Config(), model=model), parse_target("v5e-1"), compiles=False)
    assert planner.model_config.attention == attention


def test_an_evaluation_says_what_it_computes_with(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("one two three " * 20)
    args = ["eval", "--model", published, "--text", tmp_path / "one.txt", "--context-length", 100, "--json"]
    expected = json.loads(run_here(*args)[0])["loss"]
    monkeypatch.setattr(runtime, "hardware", lambda device: Hardware("tpu"))
    out, err = run_here(*args)
    assert err == "attention xla, not splash: it needs a context_length in steps of 128, not 100\n"
    assert json.loads(out)["loss"] == pytest.approx(expected, rel=1e-2)  # In bfloat16.
