"""A configuration that exists can run; what is saved comes back; what is wrong is named with what is allowed."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    load_saved_config,
    with_vocabulary,
)
from gpt_jax.config import files as config_files
from gpt_jax.errors import UserError
from gpt_jax.model.backend import resolve
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.model.lora import split
from gpt_jax.storage.files import save_json
from gpt_jax.train.optimizer import learning_rate_schedule
from gpt_jax.train.setup import check_warmup, set_up
from tests.commands import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])

SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
}


def count(low: int, high: int = 2**40) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def size(low: int) -> st.SearchStrategy[int]:
    return count(low, 2**31 - 1)


# Values that are possible, of every field; those of the fields left out are few, or depend on one another.
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "vocab_size": size(0),
        "context_length": size(1),
        "n_layer": size(1),
        "d_ff": size(0),
        "dropout": st.floats(0, 1, exclude_max=True),
        "bias": st.booleans(),
        "norm_eps": st.floats(0, 1, exclude_min=True),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
        "attention": st.sampled_from(["auto", "cudnn", "splash", "block_causal", "xla"]),
        "unroll": st.booleans(),
        "remat": st.sampled_from(["none", "full", "dots", "dots_no_batch"]),
        "loss_chunk": count(1),
    },
    "data": {
        "dir": st.text(),
        "batch_size": count(1),
        "microbatch_size": count(0),
        "source": st.lists(st.text()).map(tuple),
        "tokenizer": st.text(),
        "model_type": st.sampled_from(["bpe", "unigram", "char"]),
        "vocab_size": count(1),
        "val_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    },
    "optimizer": {
        "learning_rate": st.floats(0, 10, exclude_min=True),
        "schedule": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
        "warmup_steps": st.integers(0, 100),
        "final_fraction": st.floats(0, 1),
        "decay_fraction": st.floats(0, 1),
        "beta1": st.floats(0, 1, exclude_max=True),
        "beta2": st.floats(0, 1, exclude_max=True),
        "eps": st.floats(0, 1, exclude_min=True),
        "weight_decay": st.floats(0, 10) | st.integers(0, 10),
        "clip_norm": st.floats(0, 10) | st.integers(0, 10),
    },
    "train": {
        "steps": count(101),
        "seed": st.integers(0, 2**31 - 1),
        "log_every": count(1),
        "eval_every": count(0),
        "eval_batch_size": count(0),
        "checkpoint_every": count(0),
        "keep_checkpoints": count(1),
        "sample_every": count(0),
        "sample_prompt": st.text(),
        "sample_tokens": count(1),
        "tensorboard": st.booleans(),
        "wandb_project": st.text(),
    },
    "parallel": {"devices": count(0)},
}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any configuration that is possible."""
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        sections[name] = section(**draw(st.fixed_dictionaries({}, optional=FIELDS[name])))
    n_head, width = draw(st.integers(1, 64)), draw(st.integers(1, 256))
    sections["model"] = dataclasses.replace(sections["model"], n_head=n_head, d_model=n_head * width)
    return Config(out_dir=draw(st.text()), **sections)


# Saving and loading.


@given(config=configs())
def test_what_is_saved_comes_back(config: Config) -> None:
    saved = json.dumps(config_to_dict(config))
    assert config_from_dict(json.loads(saved), "here") == config


@each_config
def test_every_configuration_of_the_project_can_be_saved_and_changed(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_json(tmp_path / "config.json", config_to_dict(config))
    assert load_saved_config(tmp_path / "config.json") == config
    assert config.out_dir == ""
    assert config.data.dir or config.objective.grpo.environment


def test_what_is_missing_takes_its_default() -> None:
    assert config_from_dict({}, "here") == Config()
    values = config_to_dict(Config(model=ModelConfig(n_layer=3), train=TrainConfig(steps=200)))
    del values["model"]["dropout"], values["optimizer"]
    assert config_from_dict(values, "here") == Config(model=ModelConfig(n_layer=3), train=TrainConfig(steps=200))


def test_a_whole_number_may_stand_for_a_float() -> None:
    config = config_from_dict({"optimizer": {"clip_norm": 2, "learning_rate": 1}}, "here")
    assert config.optimizer == OptimizerConfig(clip_norm=2.0, learning_rate=1.0)
    assert type(config.optimizer.clip_norm) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown field modle; was it saved by a newer version?"),
        ({"model": {"n_experts": 8}}, "unknown field model.n_experts; was it saved by a newer version?"),
        ([], "the configuration must be an object, not []"),
        ({"model": 5}, "model. must be an object, not 5"),
        ({"model": {"n_layer": "3"}}, "model.n_layer = '3' must be of type int"),
        ({"model": {"n_layer": 3.0}}, "model.n_layer = 3.0 must be of type int"),
        ({"model": {"n_layer": True}}, "model.n_layer = True must be of type int"),
        ({"model": {"bias": 1}}, "model.bias = 1 must be of type bool"),
        ({"model": {"dropout": None}}, "model.dropout = None must be of type float"),
        ({"data": {"source": "shakespeare"}}, "data.source = 'shakespeare' must be of type tuple"),
        ({"model": {"n_layer": 0}}, "model.n_layer = 0 is not possible: it must be 1 or more"),
    ],
)
def test_what_cannot_be_loaded_is_named(values: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict(values, "runs/a/config.json")
    assert str(caught.value) == f"runs/a/config.json: {message}"


def test_a_saved_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{tmp_path} is not a run: it has no config.json"):
        load_saved_config(path)
    for content in (b'{"model": ', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            load_saved_config(path)


# Files that define a configuration.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no configuration file {path}; those that come with the project are in configs/"),
        ("config = Config(", "{path} could not be run: SyntaxError: "),
        ("import nowhere", "{path} could not be run: ModuleNotFoundError: No module named 'nowhere'"),
        ("1 / 0", "{path} could not be run: ZeroDivisionError: division by zero"),
        ("", "{path} does not define `config = Config(...)`"),
        ("config = {}", "{path} does not define `config = Config(...)`"),
        (
            "from gpt_jax.config import *\nconfig = Config(train=TrainConfig(steps=0))",
            "{path}: train.steps = 0 is not possible: it must be 1 or more",
        ),
    ],
)
def test_a_file_that_defines_no_configuration_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["folder.py", "config.yaml"])
def test_what_is_no_python_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".py":
        path.mkdir()
    else:
        path.write_text("steps: 5")
    with pytest.raises(UserError, match=f"no configuration file {path}|{path} is not a Python file"):
        load_config(path)


# Checks.


@pytest.mark.parametrize(
    ("section", "values", "allowed"),
    [
        *(
            ("model", {name: 0}, "1 or more")
            for name in ("context_length", "n_layer", "n_head", "d_model", "loss_chunk")
        ),
        ("model", {"vocab_size": -1}, "0 (the tokenizer's) or more"),
        ("model", {"d_ff": -1}, "0 (four times d_model) or more"),
        ("model", {"n_head": 5}, "a divisor of model.d_model = 768, where model.d_head is not set"),
        ("model", {"dropout": 1.0}, "at least 0 and less than 1"),
        ("model", {"dropout": -0.1}, "at least 0 and less than 1"),
        ("model", {"dropout": float("nan")}, "at least 0 and less than 1"),
        ("model", {"norm_eps": 0.0}, "more than 0 and less than 1e30"),
        ("model", {"dtype": "float16"}, "auto or float32 or bfloat16"),
        ("model", {"attention": "flash"}, "auto or cudnn or splash or block_causal or xla"),
        ("model", {"remat": "some"}, "none or full or dots or dots_no_batch"),
        ("data", {"batch_size": 0}, "1 or more"),
        *(
            ("model", {name: 2**31}, "less than 2**31")
            for name in ("vocab_size", "context_length", "d_model", "window")
        ),
        ("data", {"microbatch_size": -1}, "0 (the whole share) or more"),
        ("data", {"vocab_size": 0}, "1 or more"),
        *(("data", {"val_fraction": value}, "more than 0 and less than 1") for value in (0.0, 1.0)),
        ("data", {"model_type": "words"}, "bpe or unigram or char"),
        ("optimizer", {"learning_rate": 0.0}, "more than 0"),
        ("optimizer", {"learning_rate": float("nan")}, "more than 0"),
        ("optimizer", {"learning_rate": float("inf")}, "a finite number"),
        ("optimizer", {"clip_norm": 10**400}, "a finite number"),
        ("model", {"norm_eps": float("inf")}, "a finite number"),
        ("optimizer", {"schedule": "step"}, "cosine or linear or wsd or constant"),
        ("optimizer", {"warmup_steps": -1}, "0 or more"),
        *(
            ("optimizer", {name: value}, "between 0 and 1")
            for name in ("final_fraction", "decay_fraction")
            for value in (-0.1, 1.1)
        ),
        *(
            ("optimizer", {name: value}, "at least 0 and less than 1")
            for name in ("beta1", "beta2")
            for value in (-0.1, 1.0)
        ),
        ("optimizer", {"eps": 0.0}, "more than 0"),
        *(("optimizer", {name: -0.1}, "0 or more") for name in ("weight_decay", "clip_norm")),
        *(("train", {name: 0}, "1 or more") for name in ("steps", "log_every", "keep_checkpoints", "sample_tokens")),
        *(
            ("train", {name: -1}, "0 or more")
            for name in ("eval_every", "eval_batch_size", "checkpoint_every", "sample_every")
        ),
        *(("train", {"seed": value}, "at least 0 and less than 2**31") for value in (-1, 2**31)),
        ("parallel", {"devices": -1}, "0 (all) or more"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(section: str, values: dict[str, Any], allowed: str) -> None:
    [(name, value)] = values.items()
    with pytest.raises(UserError) as caught:
        SECTIONS[section](**values)
    assert str(caught.value) == f"{section}.{name} = {value!r} is not possible: it must be {allowed}"


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        ("model", "n_layer", 1.0, "int"),
        ("model", "n_layer", True, "int"),
        ("model", "bias", "yes", "bool"),
        ("model", "bias", 1, "bool"),
        ("model", "dropout", "0.1", "float"),
        ("data", "batch_size", 8.0, "int"),
        ("data", "dir", Path("data"), "str"),
        ("data", "source", "shakespeare", "tuple"),
        ("optimizer", "learning_rate", None, "float"),
        ("optimizer", "learning_rate", True, "float"),
        ("train", "steps", 1e3, "int"),
        ("train", "tensorboard", 1, "bool"),
        ("parallel", "devices", "all", "int"),
    ],
)
def test_a_value_of_another_type_is_named(section: str, name: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        SECTIONS[section](**{name: value})
    assert str(caught.value) == f"{section}.{name} = {value!r} is not possible: it must be of type {expected}"


def test_an_int_is_accepted_for_a_float() -> None:
    assert OptimizerConfig(learning_rate=1, clip_norm=0).learning_rate == 1
    assert ModelConfig(dropout=0) == ModelConfig(dropout=0.0)


def test_the_warmup_ends_before_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    """One that was given is refused, a default gives way."""
    config = Config(optimizer=OptimizerConfig(warmup_steps=10), train=TrainConfig(steps=10))
    with pytest.raises(UserError, match=r"optimizer.warmup_steps = 10 is .* it must be less than train.steps = 10$"):
        set_up(config, {"train.steps", "optimizer.warmup_steps"})
    check_warmup(config, {"train.steps"})
    assert capsys.readouterr().out == "the warmup of 10 steps is shortened to 9, since train.steps = 10\n"
    for warmup, steps in ((9, 10), (0, 1)):
        optimizer = OptimizerConfig(warmup_steps=warmup)
        check_warmup(Config(optimizer=optimizer, train=TrainConfig(steps=steps)), {"optimizer.warmup_steps"})
        assert optimizer.warmup_of(steps) == warmup
    assert capsys.readouterr().out == ""


UNLIKE_NUMBERS: dict[str, tuple[Any, ...]] = {
    "model.lora.rank": (),  # Adapters go on a model that init_from names.
    "model.d_model": (),  # With model.n_head, which divides it, see the next.
    "model.n_head": (1,),
    "model.n_kv_head": (1,),
    "model.d_head": (2, 256),
    "model.vocab_size": (10**6,),
    "model.dropout": (0.0, 0.5),
    "model.lora.dropout": (0.0, 0.5),
    "data.val_fraction": (0.01, 0.5),
    "objective.dpo.label_smoothing": (0.0, 0.4),
    "objective.grpo.clip_low": (0.01, 1.0),
    "objective.grpo.group_size": (2, 64),
    "objective.grpo.top_p": (0.1, 1.0),
    "objective.grpo.iterations": (1, 2),
    "optimizer.final_fraction": (0.0, 1.0),
    "optimizer.decay_fraction": (0.0, 1.0),
    "optimizer.beta1": (0.0, 0.999),
    "optimizer.beta2": (0.0, 0.999),
    "optimizer.warmup_steps": (0, 1),
    "train.steps": (1, 5, 10**7),
}
"""Values to try of fields for which a third of the configured value and three times as much would not do."""


@each_config
def test_no_default_contradicts_a_value_that_is_given_alone(path: Path) -> None:
    """Of each number of each section: a smaller and a larger one, where it is possible at all, make a configuration
    that is set up, and whose learning rate rises to its peak within the run."""
    config = load_config(path)

    def vary(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
        """The full name of each number in the section, a value to try, and the section with it."""
        for f in dataclasses.fields(section):
            name, value = f"{prefix}{f.name}", getattr(section, f.name)
            if dataclasses.is_dataclass(value):
                yield from (
                    (full, tried, dataclasses.replace(section, **{f.name: inner}))
                    for full, tried, inner in vary(value, f"{name}.")
                )
            elif f.name in ("dropout", "eval_batch_size") and config.objective.name == "grpo":
                continue  # They are refused, in a line of their own each.
            elif type(value) in (int, float):
                third = type(value)(value / 3)
                tries = UNLIKE_NUMBERS.get(name, (*((third,) if third else ()), 3 * value or type(value)(1)))
                yield from ((name, tried, dataclasses.replace(section, **{f.name: tried})) for tried in tries)

    tried = list(vary(config, ""))
    assert {name for name, *_ in tried} >= {"train.steps", "model.n_layer", "optimizer.learning_rate", "parallel.fsdp"}
    for name, _, changed in tried:
        check_warmup(changed, {name})
        if name in ("train.steps", "optimizer.warmup_steps"):
            steps, peak = changed.train.steps, changed.optimizer.learning_rate
            rate = learning_rate_schedule(changed.optimizer, steps)
            rates = [float(rate(step)) for step in (0, changed.optimizer.warmup_of(steps) - 1, steps - 1) if step >= 0]
            assert all(0 < r <= peak * (1 + 1e-6) for r in rates)
            assert steps == 1 or max(rates) == pytest.approx(peak, rel=0.01)


def test_the_vocabulary_is_the_tokenizers_unless_it_is_larger() -> None:
    assert with_vocabulary(Config(), 300) == Config(model=ModelConfig(vocab_size=300))
    for vocab_size in (300, 384):
        config = Config(model=ModelConfig(vocab_size=vocab_size))
        assert with_vocabulary(config, 300) == config
    too_small = Config(model=ModelConfig(vocab_size=299), data=DataConfig(dir="data/mine"))
    with pytest.raises(UserError) as caught:
        with_vocabulary(too_small, 300)
    assert str(caught.value) == (
        "model.vocab_size = 299 is not possible: it must be at least the 300 tokens of the tokenizer in data/mine, or 0"
    )


# The number of parameters.


@each_config
def test_parameters_are_counted_as_they_are_made(path: Path) -> None:
    """Against the shapes that the model really has, adapters apart."""
    config = with_vocabulary(load_config(path), 67) if load_config(path).model.vocab_size == 0 else load_config(path)
    model = GPT(resolve(config.model, "cpu"))
    _, shapes = split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    assert config.model.n_params == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_gpt2_has_the_size_of_the_released_models(name: str, n_params: int) -> None:
    """What the weights on the Hugging Face Hub add up to, with GPT-2's own vocabulary of 50,257 tokens."""
    config = load_config(ROOT / "configs" / f"{name}.py").model
    assert dataclasses.replace(config, vocab_size=50_257).n_params == n_params


def test_an_infinite_clip_norm_of_an_older_version_is_none() -> None:
    values = config_to_dict(Config())
    values["optimizer"]["clip_norm"] = float("inf")
    assert config_from_dict(values, "config.json").optimizer.clip_norm == 0


def test_a_renamed_field_of_an_older_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """From version 0, which wrote no number, over every version between; also from one section to another."""
    values = config_to_dict(Config())
    assert values.pop("format_version") == config_files.FORMAT_VERSION
    values["train"]["n_steps"] = 7
    del values["train"]["steps"]
    renamed = ({"train.n_steps": "data.n_steps"}, {"data.n_steps": "train.steps"})
    monkeypatch.setattr(config_files, "RENAMED", renamed)
    monkeypatch.setattr(config_files, "FORMAT_VERSION", 2)
    old = dataclasses.replace(Config(), train=TrainConfig(steps=7), optimizer=OptimizerConfig(warmup_steps=0))
    values["optimizer"]["warmup_steps"] = 0
    assert config_from_dict(values, "config.json") == old
    moved = {**config_to_dict(old), "format_version": 1}
    moved["data"] |= {"n_steps": moved["train"].pop("steps")}
    assert config_from_dict(moved, "config.json") == old
    assert config_from_dict(config_to_dict(old), "config.json") == old
    with pytest.raises(UserError, match=r"unknown field train\.n_steps"):
        config_from_dict({**values, "format_version": 2}, "config.json")


@pytest.mark.parametrize("version", [config_files.FORMAT_VERSION + 1, -1, "one", None, 1.5])
def test_a_newer_format_is_named(version: Any) -> None:
    with pytest.raises(UserError, match=r"config\.json is of format .*; update gpt_jax"):
        config_from_dict({**config_to_dict(Config()), "format_version": version}, "config.json")
