"""What strangers write into a config.json is read as transformers 5 reads it, or refused in one line, at once.

A table of cases, each with its answer, and a fuzzer. The tensors are zeros: nothing here looks at them but at their
names and shapes.
"""

import contextlib
import dataclasses
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.rope import frequencies
from gpt_jax.run.load import open_source
from tests import tiny
from tests.interop.models import publish_zeros
from tests.memory import at_most

GONE = ["left out"]  # Instead of a value: the setting is left out.
HUGE = 2_000_000_000
INF, NAN = float("inf"), float("nan")
FULL, SLIDING = "full_attention", "sliding_attention"

MODELS = {
    "gpt2": tiny.GPT2,
    "llama": tiny.LLAMA,
    "mistral": dataclasses.replace(tiny.LLAMA, window=8),
    "qwen2": dataclasses.replace(tiny.LLAMA, biases=("qkv",)),
    "gemma3_text": dataclasses.replace(tiny.GEMMA, query_scale=0.25, activation="gelu_tanh"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By family: a folder with weights, and the settings that belong to them."""
    folder = tmp_path_factory.mktemp("published")
    models = {name: (folder / name, publish_zeros(folder / name, config)) for name, config in MODELS.items()}
    assert all(settings["model_type"] == name for name, (_, settings) in models.items())
    return models


def folder_with(to: Path, weights: Path, content: bytes) -> Path:
    """A folder with these weights and this config.json."""
    to.mkdir(exist_ok=True)
    for path in (to / "model.safetensors", to / "config.json"):
        path.unlink(missing_ok=True)
    (to / "model.safetensors").symlink_to(weights / "model.safetensors")
    (to / "config.json").write_bytes(content)
    return to


def opened(folder: Path) -> ModelConfig:
    """What a command does with a model before it loads the parameters, and the frequencies of its positions."""
    source = open_source(str(folder))
    source.check()
    config = source.config
    assert all(np.isfinite(frequencies(config, sliding)[0]).all() for sliding in (False, True))
    return config


def changed(model: tuple[Path, dict[str, Any]], to: Path, **changes: Any) -> Path:
    """The folder of a model with other settings."""
    settings = {name: value for name, value in {**model[1], **changes}.items() if value is not GONE}
    return folder_with(to, model[0], json.dumps(settings).encode())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def claims(name: str, *values: Any) -> list[tuple[str, dict[str, Any], str]]:
    return [
        ("llama", {name: value}, f"{name} = {value}, but no tensor there has more than 8352 numbers")
        for value in values
    ]


# The family, other settings than those that belong to the tensors, and a part of the message.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Numbers that the tensors cannot hold.
    ("llama", {"num_hidden_layers": HUGE}, "num_hidden_layers = 2000000000, but the tensors there are of 2 layers"),
    ("llama", {"num_hidden_layers": 10**40}, f"num_hidden_layers = {10**40}, but the tensors there are of 2 layers"),
    ("llama", {"num_hidden_layers": 3}, "num_hidden_layers = 3, but the tensors there are of 2 layers"),
    ("llama", {"num_hidden_layers": GONE}, "num_hidden_layers = 32, but the tensors there are of 2 layers"),
    ("llama", {"num_hidden_layers": 1}, "not known: model.layers.1."),
    ("gpt2", {"num_hidden_layers": 10**9}, "n_layer = 1000000000, but the tensors there are of 2 layers"),
    *claims("vocab_size", HUGE, 2**31 - 1),
    *claims("hidden_size", HUGE),
    *claims("intermediate_size", HUGE),
    *claims("num_attention_heads", HUGE),
    *claims("head_dim", HUGE, 2**30),
    (
        "llama",
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**30},
        "num_attention_heads = 1073741824, but no tensor there",
    ),
    ("llama", {"head_dim": 2**31}, "model.d_head = 2147483648 is not possible: it must be less than 2**31"),
    ("llama", {"hidden_size": 10**40}, f"model.d_model = {10**40} is not possible: it must be less than 2**31"),
    ("llama", {"max_position_embeddings": 2**31}, "model.context_length = 2147483648 is not possible"),
    ("gpt2", {"n_positions": 2**31 - 1}, "transformer.wpe.weight (32, 32), not (2147483647, 32)"),
    ("gpt2", {"n_inner": 10**12}, "model.d_ff = 1000000000000 is not possible: it must be less than 2**31"),
    ("mistral", {"sliding_window": 10**30}, "model.window = 1000000000000000000000000000000 is not possible"),
    # Shapes that differ.
    ("llama", {"vocab_size": 262}, "lm_head.weight (261, 32), not (262, 32)"),
    ("llama", {"vocab_size": 260}, "lm_head.weight (261, 32), not (260, 32)"),
    ("llama", {"num_key_value_heads": None}, "model.layers.0.self_attn.k_proj.weight (16, 32), not (32, 32)"),
    ("llama", {"num_key_value_heads": GONE}, "model.layers.0.self_attn.k_proj.weight (16, 32), not (32, 32)"),
    ("llama", {"head_dim": 10}, "model.layers.0.self_attn.q_proj.weight (32, 32), not (40, 32)"),
    ("llama", {"attention_bias": True}, "missing: model.layers.0.self_attn.o_proj.bias"),
    ("gpt2", {"n_head": 3}, "model.n_head = 3 is not possible: it must be a divisor of model.d_model = 32"),
    ("gpt2", {"hidden_size": 64}, "transformer.ln_f.weight (32,), not (64,)"),
    ("llama", {"num_key_value_heads": 3}, "model.n_kv_head = 3 is not possible: it must be a divisor of model.n_head"),
    # Values of other types, and impossible ones.
    ("llama", {"num_hidden_layers": 2.0}, "model.n_layer = 2.0 is not possible: it must be of type int"),
    ("llama", {"num_hidden_layers": True}, "model.n_layer = True is not possible: it must be of type int"),
    ("llama", {"num_hidden_layers": [2]}, "model.n_layer = [2] is not possible: it must be of type int"),
    ("llama", {"num_hidden_layers": -1}, "model.n_layer = -1 is not possible: it must be 1 or more"),
    ("llama", {"vocab_size": 0}, "vocab_size = 0 is not possible: it must be 1 or more"),
    ("llama", {"vocab_size": None}, "vocab_size = 0 is not possible: it must be 1 or more"),
    ("llama", {"hidden_size": "x" * 10**6}, "model.d_model = 'xxxxxx"),
    ("llama", {"tie_word_embeddings": "false"}, "model.tied_head = 'false' is not possible: it must be of type bool"),
    ("llama", {"rms_norm_eps": "1e-5"}, "model.norm_eps = '1e-5' is not possible: it must be of type float"),
    ("llama", {"rms_norm_eps": NAN}, "model.norm_eps = nan is not possible"),
    ("llama", {"rms_norm_eps": INF}, "model.norm_eps = inf is not possible"),
    ("llama", {"rms_norm_eps": 1e39}, "model.norm_eps = 1e+39 is not possible: it must be more than 0 and less"),
    ("llama", {"rms_norm_eps": 0}, "model.norm_eps = 0.0 is not possible: it must be more than 0"),
    ("llama", {"hidden_act": 5}, "hidden_act = 5 is not known; known are gelu_new"),
    ("llama", {"hidden_act": ["silu"]}, "has a configuration that is no llama's"),
    ("llama", {"architectures": 5}, "has a configuration that is no llama's"),
    ("llama", {"model_type": None}, "models of type None are not supported"),
    ("llama", {"model_type": "LLAMA"}, "models of type 'LLAMA' are not supported"),
    ("llama", {"model_type": GONE}, "has no model_type, so it is not of a published model"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "is quantised; take the model in float32"),
    ("gemma3_text", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar = -4 is not possible"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 is not possible"),
    ("gemma3_text", {"query_pre_attn_scalar": 1e-320}, "model.query_scale = "),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
    # Rotary positions.
    ("llama", {"rope_scaling": "linear"}, "has a configuration that is no llama's"),
    ("llama", {"rope_scaling": {"rope_type": {"a": 1}}}, "rotary positions of type {'a': 1} are not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rotary positions of type 'linear' need factor"),
    ("llama", {"rope_scaling": {"type": "dynamic"}}, "rotary positions of type 'dynamic' need factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "need low_freq_factor, high_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "model.rope.factor = 0.0 is not possible"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": INF}}, "model.rope.factor = inf is not possible"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": NAN}}, "model.rope.factor = nan is not possible"),
    ("llama", {"rope_scaling": YARN | {"beta_fast": 1e-320}}, "model.rope.beta_fast = 1e-320 is not possible"),
    ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings = 0"),
    ("llama", {"rope_scaling": YARN | {"attention_factor": INF}}, "model.rope.attention_factor = inf is not possible"),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**40}},
        "model.rope.original_context = 1099511627776 is not possible",
    ),
    ("llama", {"rope_theta": 0, "rope_parameters": GONE}, "model.rope.theta = 0.0 is not possible"),
    ("llama", {"rope_theta": INF, "rope_parameters": GONE}, "model.rope.theta = inf is not possible"),
    # Layers with a window.
    ("qwen2", {"layer_types": [FULL]}, "layer_types has 1 types, and there are 2 layers"),
    ("qwen2", {"layer_types": []}, "layer_types has 0 types, and there are 2 layers"),
    ("qwen2", {"layer_types": [FULL] * 10**5}, "layer_types has 100000 types, and there are 2 layers"),
    ("qwen2", {"layer_types": [SLIDING] * 2}, "layer_types has sliding layers, but no sliding_window is set or used"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "has a configuration that is no qwen2's"),
    ("gemma3_text", {"sliding_window": None}, "layer_types has sliding layers, but no sliding_window is set or used"),
    ("gemma3_text", {"layer_types": GONE, "sliding_window_pattern": 0}, "is no gemma3_text's (ZeroDivisionError"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(published: dict[str, Any], tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    """In one line that is not long, with little memory, whatever is claimed."""
    folder = changed(published[family], tmp_path / "model", **changes)
    with at_most(megabytes=50), pytest.raises(UserError) as error:
        opened(folder)
    told = str(error.value)
    assert message in told
    assert str(folder) in told
    assert "\n" not in told
    assert len(told) < 4000


# Which of two places counts, and what is told. The first three are as transformers has it, see `test_families.py`.
COUNTS: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope.scaling": "linear", "rope.factor": 4.0},
        [
            "rope_scaling = {'rope_type': 'linear', 'factor': 4} counts, not rope_parameters = "
            "{'rope_type': 'linear', 'factor': 2.0}"
        ],
    ),
    (
        "llama",
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        {"rope.theta": 700.0},
        ["rope_theta of rope_parameters = 700.0 counts, not rope_theta = 500.0"],
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 2.0}, "rope_parameters": GONE},
        {"rope.scaling": "dynamic"},
        ["rope_type = 'dynamic' counts, not type = 'linear'"],
    ),
    (
        "llama",
        {"rope_scaling": YARN | {"factor": 2.0}, "rope_parameters": GONE},
        {"rope.factor": 2.0, "rope.original_context": 8},
        ["factor = 2.0 counts, not the context over original_max_position_embeddings = 4.0"],
    ),
    ("llama", {"rope_scaling": YARN, "rope_parameters": GONE}, {"rope.factor": 4.0}, []),
    (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 16, "rope_parameters": GONE},
        {"rope.original_context": 8},
        ["original_max_position_embeddings of rope_scaling = 8 counts, not original_max_position_embeddings = 16"],
    ),
    ("llama", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 5e5}, {"rope.theta": 5e5}, []),
    ("llama", {"rope_parameters": GONE, "rope_theta": GONE}, {"rope.theta": 10_000.0}, []),
    (
        "gemma3_text",
        {"rope_local_base_freq": 7.0},
        {"rope.local_theta": 10_000.0},
        ["rope_theta of the sliding layers = 10000.0 counts, not rope_local_base_freq = 7.0"],
    ),
    ("llama", {"head_dim": None}, {"head_dim": 8}, []),
    ("llama", {"head_dim": GONE}, {"head_dim": 8}, []),
    ("llama", {"max_position_embeddings": 2**31 - 1}, {"context_length": 2**31 - 1}, []),
    (
        "llama",
        {"hidden_activation": "relu"},
        {"activation": "silu"},
        ["hidden_act = 'silu' counts, not hidden_activation = 'relu'"],
    ),
    (
        "gemma3_text",
        {"hidden_act": "silu"},
        {"activation": "gelu_tanh"},
        ["hidden_activation = 'gelu_pytorch_tanh' counts, not hidden_act = 'silu'"],
    ),
    ("gemma3_text", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}, []),
    (
        "llama",
        {"architectures": ["MistralForCausalLM"]},
        {"window": 0},
        ["model_type = 'llama' counts, not architectures = ['MistralForCausalLM']"],
    ),
    (
        "llama",
        {"dtype": GONE, "torch_dtype": "float16"},
        {},
        ["the tensors are of the type float32, and are read as they are, not as float16"],
    ),
    ("llama", {"dtype": "float32", "torch_dtype": "float16"}, {}, []),
    ("gpt2", {"num_attention_heads": 2}, {"n_head": 2}, ["num_attention_heads = 2 counts, not n_head = 4"]),
    ("gpt2", {"num_attention_heads": 2, "n_head": GONE}, {"n_head": 2}, []),
    ("gpt2", {"n_ctx": 7}, {"context_length": 32}, ["n_positions = 32 counts, not n_ctx = 7"]),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, {"window": 0}, []),
    (
        "qwen2",
        {"sliding_window": None, "use_sliding_window": True, "layer_types": GONE},
        {"window": 0},
        ["sliding_window = None counts, not use_sliding_window = True: no layer has a window"],
    ),
    (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": [SLIDING, FULL], "max_window_layers": 1},
        {"window": 8, "window_pattern": "sf"},
        ["layer_types counts, not max_window_layers = 1"],
    ),
    (
        "mistral",
        {"layer_types": [SLIDING, FULL]},
        {"window": 8, "window_pattern": "s"},
        ["sliding_window = 8 counts for all layers, not layer_types"],
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        {"window": 6, "window_pattern": "ssf"},
        ["layer_types counts, not sliding_window_pattern = 2"],
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2, "layer_types": GONE},
        {"window": 6, "window_pattern": "sf"},
        [],
    ),
]


@pytest.mark.parametrize(("family", "changes", "values", "told"), COUNTS, ids=lambda value: str(value)[:60])
def test_which_place_counts(
    published: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    changes: dict[str, Any],
    values: dict[str, Any],
    told: list[str],
) -> None:
    folder = changed(published[family], tmp_path / "model", **changes)
    config = opened(folder)
    flat = {**vars(config), **{f"rope.{name}": value for name, value in vars(config.rope).items()}}
    flat["head_dim"] = config.head_dim
    assert {name: flat[name] for name in values} == values
    assert capsys.readouterr().err.splitlines() == [f"{folder}: {line}" for line in told]


def valid(published: dict[str, Any]) -> bytes:
    return json.dumps(published["llama"][1]).encode()


NO_JSON = "config.json holds no JSON object; copy or download it again"
FILES: dict[str, tuple[Any, str]] = {
    "empty": (b"", NO_JSON),
    "a list": (b"[]", NO_JSON),
    "null": (b"null", NO_JSON),
    "cut": (lambda whole: whole[:-1], NO_JSON),
    "more after it": (lambda whole: whole + b"{}", NO_JSON),
    "deep": (b'{"a": ' * 200_000, NO_JSON),
    "not UTF-8": (b'{"model_type": "\xe9"}', NO_JSON),
    "a number of 5,000 digits": (b'{"n": ' + b"9" * 5000 + b"}", NO_JSON),
    "a trailing comma": (lambda whole: whole[:-1] + b",}", NO_JSON),
    "HTML": (b"<!DOCTYPE html>", NO_JSON),
    "a mark of UTF-8": (lambda whole: b"\xef\xbb\xbf" + whole, ""),
    "UTF-16": (lambda whole: whole.decode().encode("utf-16"), ""),
    "a key twice": (lambda whole: b'{"vocab_size": 5, ' + whole[1:], ""),  # The last one counts, as in transformers.
    "spaces": (lambda whole: b"\n\t " + whole + b" \r\n", ""),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_as_a_whole(published: dict[str, Any], tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    whole = valid(published)
    folder = folder_with(tmp_path / "model", published["llama"][0], content(whole) if callable(content) else content)
    if not message:
        assert opened(folder).n_layer == 2
        return
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_what_is_no_file(published: dict[str, Any], tmp_path: Path) -> None:
    """A pipe is not waited for, and a file of gigabytes is not read."""
    folder = folder_with(tmp_path / "model", published["llama"][0], b"")
    path = folder / "config.json"
    os.truncate(path, 3 * 10**9)  # Takes no space on the disk.
    with pytest.raises(UserError, match=r"config.json has 3,000,000,000 bytes, which no file of settings has"):
        opened(folder)
    for make in (os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("nothing")):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(UserError, match=r"it has no config\.json"):
            opened(folder)


NUMBERS = st.one_of(
    st.integers(), st.integers(-2, 2**33), st.floats(), st.sampled_from([0, 1, 8, 261, HUGE, 2**31 - 1, 1e300])
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from([SLIDING, FULL, "linear", "yarn"])
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", FULL, "beta_fast"]), inner, max_size=4)
    ),
    max_leaves=5,
)
MORE = ["rope_scaling", "torch_dtype", "original_max_position_embeddings", "sliding_window", "max_window_layers"]
MORE += ["n_ctx", "hidden_activation", "use_sliding_window", "partial_rotary_factor", "num_attention_heads"]


@settings(max_examples=120, deadline=timedelta(seconds=20))
@given(data=st.data())
def test_any_values(published: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A model of finite frequencies, or one line; never a traceback, never more than a few seconds and megabytes."""
    model = published[data.draw(st.sampled_from(sorted(published)))]
    names = st.sampled_from([*model[1], *MORE])
    changes = data.draw(st.dictionaries(names, VALUES | st.just(GONE), min_size=1, max_size=3))
    folder = changed(model, tmp_path_factory.getbasetemp() / "any_values", **changes)
    with at_most(megabytes=100), contextlib.suppress(UserError):
        opened(folder)
