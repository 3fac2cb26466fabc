"""Every family against transformers, with small models of random weights. Needs the extra `parity`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import AttentionName, ModelConfig
from gpt_jax.interop.families import FAMILIES, family_for
from gpt_jax.interop.load import PADDED_TO, load_params, their_config
from gpt_jax.interop.model_files import ModelFiles, open_model
from gpt_jax.interop.save import in_a_family, parts_of, write_model
from gpt_jax.model.backend import resolve
from gpt_jax.model.cache import init_cache
from gpt_jax.model.forward import forward, forward_cached
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD, logits_NV
from gpt_jax.model.stack import unstack
from gpt_jax.placement import Placement
from gpt_jax.run.load import open_source
from tests.cases import cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity

T = 48
COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": T, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-erf-gelu-wide": ("GPT2Config", GPT2 | {"activation_function": "gelu", "n_inner": 72}),
    "gpt2-untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("LlamaConfig", COMMON),
    "llama-tied-own-head-width": ("LlamaConfig", COMMON | {"tie_word_embeddings": True, "head_dim": 10}),
    "llama-biases": ("LlamaConfig", COMMON | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaConfig", COMMON | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("LlamaConfig", COMMON | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": ("LlamaConfig", COMMON | {"rope_scaling": YARN}),
    "llama-yarn-mscale": ("LlamaConfig", COMMON | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}}),
    "llama-yarn-one-mscale": ("LlamaConfig", COMMON | {"rope_scaling": YARN | {"mscale": 0.7}}),
    "llama-llama3": ("LlamaConfig", COMMON | {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "mistral": ("MistralConfig", COMMON | {"sliding_window": 8}),
    "mistral-no-window": ("MistralConfig", COMMON | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen2-window": (
        "Qwen2Config",
        COMMON | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        COMMON | {"num_hidden_layers": 7, "sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 12},
    ),
}


def make(name: str) -> Any:
    """A model in which every weight is random: biases and norms too, which start as 0 and 1."""
    config_class, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(attn_implementation="eager", **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of transformers, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param)
    model.save_pretrained(folder)
    return model, folder


def load(files: ModelFiles, **changes: Any) -> tuple[GPT, Params]:
    config = dataclasses.replace(resolve(their_config(files), "cpu"), vocab_multiple=PADDED_TO, **changes)
    return GPT(config), load_params(files, config, Placement(jax.devices()[:1]).state_shardings)


def our_logits(model: GPT, params: Params, tokens: np.ndarray) -> np.ndarray:
    @jax.jit
    def compute(params: Params) -> jax.Array:
        return jax.vmap(lambda hidden: logits_NV(model, params, hidden))(forward(model, params, jnp.asarray(tokens)))

    return np.asarray(compute(params))[..., : model.config.vocab_size]


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 99, (2, T))


@pytest.mark.parametrize("attention", ["xla", "block_causal"])
def test_logits_equal(published: tuple[Any, Path], tokens: np.ndarray, attention: AttentionName) -> None:
    """Within 1e-4 in float32, over a full window."""
    theirs, folder = published
    expected = their_logits(theirs, tokens)
    assert np.abs(expected).max() > 0.5
    ours = our_logits(*load(open_model(folder), attention=attention), tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("published", cases(MODELS, ["gpt2", "llama-dynamic", "qwen3", "gemma3"]), indirect=True)
def test_cached_decoding_equals(published: tuple[Any, Path], tokens: np.ndarray) -> None:
    """The same, token by token after a prefill of 20."""
    theirs, folder = published
    expected = their_logits(theirs, tokens)
    model, params = load(open_model(folder))
    params = {**params, "layers": unstack(params["layers"], model.config.n_layer)}
    step = jax.jit(lambda tokens, cache, start: forward_cached(model, params, tokens, cache, start))
    hidden, cache = step(jnp.asarray(tokens[:, :20]), init_cache(model.config, 2, T), jnp.zeros(2, jnp.int32))
    for t in range(20, T):
        ours = logits_NV(model, params, hidden[:, -1])[:, :99]
        np.testing.assert_allclose(ours, expected[:, t - 1], atol=1e-4, rtol=0)
        hidden, cache = step(jnp.asarray(tokens[:, t : t + 1]), cache, jnp.full(2, t, jnp.int32))


def save(folder: Path, model: GPT, params: Params) -> None:
    """What an export writes, but for the tokenizer."""
    config, read, family = in_a_family(model.config, parts_of(params))
    write_model(folder, family, config, read, "float32")
    settings = family.to_settings(config) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(settings))


def test_round_trip(published: tuple[Any, Path], tokens: np.ndarray, tmp_path: Path) -> None:
    """Import, export, import: the same bits; and transformers computes with the export what it did before."""
    theirs, folder = published
    model, params = load(open_model(folder))
    save(tmp_path, model, params)
    again_model, again = load(open_model(tmp_path))
    assert again_model.config.architecture() == model.config.architecture()
    jax.tree.map(np.testing.assert_array_equal, again, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(their_logits(exported, tokens), their_logits(theirs, tokens), atol=1e-5, rtol=0)


def test_dynamic_scaling_at_a_raised_context(tmp_path: Path) -> None:
    """Over a full window: transformers raises the base by the longest text that it has seen, ours by the context. The
    export, which has the raised base, gives the same also for a part of it."""
    n = 3 * T
    theirs = make("llama-dynamic")
    theirs.save_pretrained(tmp_path / "original")
    tokens = np.random.default_rng(0).integers(0, 99, (2, n))
    model, params = load(open_model(tmp_path / "original"), context_length=n)
    ours = our_logits(model, params, tokens)
    assert np.abs(ours - our_logits(*load(open_model(tmp_path / "original")), tokens)).max() > 1e-2
    np.testing.assert_allclose(ours, their_logits(theirs, tokens), atol=1e-4, rtol=0)
    save(tmp_path, model, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(their_logits(exported, tokens[:, :T]), ours[:, :T], atol=1e-4, rtol=0)
    np.testing.assert_allclose(their_logits(exported, tokens), ours, atol=1e-4, rtol=0)


TIED = {
    "gpt2": ("GPT2Config", GPT2 | {"n_layer": 1}),
    **{
        name: (f"{name}Config", COMMON | {"num_hidden_layers": 1, "tie_word_embeddings": True})
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text")
    },
}


@pytest.mark.parametrize("stored", ["the other name", "both names", "other values"])
@pytest.mark.parametrize("name", TIED)
def test_tied_heads_in_every_form(
    name: str, stored: str, tokens: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tied head is stored as the embeddings, as the head (as `save_model` of safetensors may leave it), or as both.

    If the two differ, the configuration is wrong: transformers does not tie then, and says so, and so do we.
    """
    config_class, settings = TIED[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings))
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    [embeddings] = [key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight"))]
    if stored == "the other name":
        tensors["lm_head.weight"] = tensors.pop(embeddings)
    else:
        tensors["lm_head.weight"] = tensors[embeddings] * (1 if stored == "both names" else 2)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    capsys.readouterr()
    source = open_source(str(tmp_path))
    note = (
        "tie_word_embeddings is true, but the head has other values than the embeddings; it is taken as it is, untied"
    )
    assert capsys.readouterr().err == (f"{tmp_path}: {note}\n" if stored == "other values" else "")
    assert source.config.tied_head == (stored != "other values")
    source.check()
    params = source.load_params(source.config, Placement(jax.devices()[:1]))
    np.testing.assert_array_equal(params["tokens_VD"], theirs.get_input_embeddings().weight.detach())
    np.testing.assert_array_equal(head_VD(params), theirs.get_output_embeddings().weight.detach())
    if name == "Llama":
        ours = our_logits(GPT(resolve(source.config, "cpu")), params, tokens)
        np.testing.assert_allclose(ours, their_logits(theirs, tokens), atol=1e-4, rtol=0)


CHOICES: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": YARN}, "rope.factor", "factor"),
    (
        "llama",
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        "rope.theta",
        "rope_theta",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 2.0}},
        "rope.scaling",
        "rope_type",
    ),
    (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 20},
        "rope.original_context",
        "original_max_position_embeddings",
    ),
    ("gpt2", {"n_head": 8, "num_attention_heads": 2}, "n_head", "n_head"),
    ("gpt2", {"n_positions": 12, "n_ctx": 24}, "context_length", "n_positions"),
    ("gemma3_text", {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * 3}, "sliding", "layer_types"),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, "window", "sliding_window"),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, "window", "sliding_window"),
]


@pytest.mark.parametrize(("model_type", "changes", "ours", "theirs"), CHOICES, ids=lambda value: str(value)[:50])
def test_of_two_settings_that_count_counts_which_counts_in_transformers(
    model_type: str, changes: dict[str, Any], ours: str, theirs: str
) -> None:
    settings = (GPT2 if model_type == "gpt2" else COMMON) | {"model_type": model_type, "num_hidden_layers": 3} | changes
    settings |= {name: settings[alias] for alias, name in FAMILIES[model_type].aliases.items() if alias in settings}
    config = FAMILIES[model_type].to_config(settings, "")
    their_config = transformers.CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(settings)))
    in_rope = getattr(their_config, "rope_parameters", None) or {}
    value = in_rope[theirs] if theirs in in_rope else getattr(their_config, theirs)
    if theirs == "layer_types":
        value = tuple(kind == "sliding_attention" for kind in value)
    assert (getattr(config.rope, ours[5:]) if ours.startswith("rope.") else getattr(config, ours)) == (value or 0)


def test_every_family_is_covered() -> None:
    types = {getattr(transformers, config_class)().model_type for config_class, _ in MODELS.values()}
    assert types == set(FAMILIES)


def test_a_model_without_biases_gets_those_that_gpt2_has(tokens: np.ndarray, tmp_path: Path) -> None:
    config = resolve(ModelConfig(vocab_size=99, context_length=T, n_layer=2, n_head=4, d_model=32, bias=False), "cpu")
    assert family_for(config) is None
    rng = np.random.default_rng(0)
    model = GPT(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, T), jnp.int32)))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    save(tmp_path, model, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(their_logits(exported, tokens), our_logits(model, params, tokens), atol=1e-4, rtol=0)
