"""Models in GGUF files, the format of llama.cpp, presented like their folders on the hub.

llama.cpp renames the tensors, stores some in another layout, and describes the architecture in metadata of its own
(convert_hf_to_gguf.py in its repository). All of that is undone here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import RopeConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.gguf_file import GGUFFile
from gpt_jax.model.rope import llama3, plain

# llama.cpp's names of tensors to transformers', without .weight or .bias; {} is the number of the layer.
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_QWEN3_NAMES = _LLAMA_NAMES | {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_GEMMA3_NAMES = _QWEN3_NAMES | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "blk.{}.attn_norm": "transformer.h.{}.ln_1",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA_NAMES,  # Mistral's models, too.
    "qwen2": _LLAMA_NAMES,
    "qwen3": _QWEN3_NAMES,
    "gemma3": _GEMMA3_NAMES,
    "gpt2": _GPT2_NAMES,
}
# Matrices that have the inputs first in transformers' GPT-2, and the outputs first in llama.cpp.
TRANSPOSED_IN_GPT2 = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
# Llama 3's scaling of rotary positions: the divisor of each frequency. It belongs to the configuration.
ROPE_FACTORS = "rope_freqs.weight"
# The settings of each supported scaling of rotary positions.
ROPE_SCALING = {
    "linear": ("factor",),
    "yarn": ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"),
}


class GGUFWeights:
    """The tensors of a GGUF file under transformers' names and in its layout, and the metadata as a config.json."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises UserError when the file is damaged, or its model or types are not supported."""
        self.where = str(path)
        self._file = GGUFFile(path)
        self.fields = self._file.fields
        self.types: frozenset[str] = frozenset()  # Quantised or not, they are read as they are.
        metadata = _Metadata(self._file)
        self._architecture = metadata.architecture
        self.config = _gpt2_config(metadata) if self._architecture == "gpt2" else _llama_config(metadata)
        self.notes = _told_twice(metadata, self.config["vocab_size"])
        gguf_names = [name for name in self._file.shapes if name != ROPE_FACTORS]
        self._gguf_names = {self._name(name): name for name in gguf_names}
        self.shapes = {
            name: self._file.shapes[gguf_name][::-1] if self._is_transposed(gguf_name) else self._file.shapes[gguf_name]
            for name, gguf_name in self._gguf_names.items()
        }

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """See Weights."""
        gguf_name = self._gguf_names[name]
        if out is None:
            out = np.empty(self.shapes[name], np.float32)
        assert out.shape == self.shapes[name]
        self._file.fill(gguf_name, self._in_file_order(gguf_name, out))
        if self._architecture == "gemma3" and _parts(gguf_name)[1].endswith("norm"):
            out -= 1  # llama.cpp stores the scale, Gemma the scale minus 1.
        return out

    def _name(self, gguf_name: str) -> str:
        """The name in transformers. An unknown tensor keeps its own name, and is refused later."""
        layer, kind, suffix = _parts(gguf_name)
        pattern = NAMES[self._architecture].get(f"blk.{{}}.{kind}" if layer else kind)
        return f"{pattern.format(layer)}.{suffix}" if pattern else gguf_name

    def _is_transposed(self, gguf_name: str) -> bool:
        _, kind, suffix = _parts(gguf_name)
        return self._architecture == "gpt2" and kind in TRANSPOSED_IN_GPT2 and suffix == "weight"

    def _in_file_order(self, gguf_name: str, out: np.ndarray) -> np.ndarray:
        """A view of `out`, which is laid out as in transformers, with its elements in the order of the file."""
        if self._is_transposed(gguf_name):
            return out.T
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(_parts(gguf_name)[1])
        if self._architecture == "llama" and heads:
            # llama.cpp rotates neighbouring dimensions, transformers those that are half a head apart: the file
            # interleaves the rows of the two halves of each head.
            return out.reshape(self.config[heads], 2, -1, *out.shape[1:]).swapaxes(1, 2)
        return out


def _parts(gguf_name: str) -> tuple[str, str, str]:
    """Layer, kind and suffix: 3, attn_q and weight of blk.3.attn_q.weight. Empty for names of another form."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    return (match[1] or "", match[2], match[3]) if match else ("", "", "")


class _Metadata:
    """The metadata of a model. Raises UserError naming a key that is missing or has an impossible value."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture: str = file.fields.get("general.architecture", "")
        if self.architecture not in list(NAMES):
            raise self.refused(f"is of the architecture {self.architecture!r}; supported are {', '.join(NAMES)}")
        if file.fields.get("split.count", 1) not in (0, 1):
            raise self.refused("is one of several parts; merge them with llama-gguf-split --merge")
        if self.integer("expert_count", 0):
            raise self.refused("is a mixture of experts, which is not supported")
        if self.get("attention.causal") is False:
            raise self.refused("is a model whose tokens see those after them, which is not supported")

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.file.path} {why}")

    def get(self, key: str) -> Any:
        """The value of a key of the architecture, or None. A list of equal values, one per layer, counts as one."""
        value = self.file.fields.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._value(key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal of the stored float32: 1e-05, and not 9.999999747378752e-06."""
        return float(str(np.float32(self._value(key, int | float, default))))

    def _value(self, key: str, kind: Any, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise self.refused(f"lacks {self.architecture}.{key} in its metadata; convert the model again")
        if value is None or value == default:
            return default
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise self.refused(f"has {self.architecture}.{key} = {value!r:.40} in its metadata, which is not supported")
        return value

    def rows(self, tensor: str) -> int:
        """The length of a tensor's first axis."""
        if tensor not in self.file.shapes:
            raise self.refused(f"lacks the tensor {tensor}; convert the model again")
        return self.file.shapes[tensor][0]

    def has(self, tensor: str) -> bool:
        return tensor in self.file.shapes


def _special_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the tokens that begin, end and pad texts, as far as the file has them."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: fields.get(f"tokenizer.ggml.{metadata_key}") for name, metadata_key in names.items()}
    return {name: token for name, token in ids.items() if isinstance(token, int)}


def _told_twice(metadata: _Metadata, n_rows: int) -> tuple[str, ...]:
    """A line for each thing that the metadata says in another way than what counts; n_rows: of the embeddings."""
    notes = []
    tokens, vocab_size = metadata.file.fields.get("tokenizer.ggml.tokens"), metadata.get("vocab_size")
    if isinstance(tokens, list) and len(tokens) < n_rows:  # llama.cpp refuses it; in folders, it is padding.
        notes.append(f"the embeddings have {n_rows} rows, and the vocabulary {len(tokens)} tokens; the rest is padding")
    if isinstance(vocab_size, int) and vocab_size != n_rows:
        notes.append(f"the embeddings' {n_rows} rows count, not {metadata.architecture}.vocab_size = {vocab_size}")
    if metadata.architecture in ("qwen2", "qwen3") and metadata.get("attention.sliding_window"):
        notes.append(f"{metadata.architecture}.attention.sliding_window is not used, as in llama.cpp")
    return tuple(notes)


def _gpt2_config(metadata: _Metadata) -> dict[str, Any]:
    """A config.json for GPT-2."""
    return {
        "model_type": "gpt2",
        "vocab_size": metadata.rows("token_embd.weight"),
        "n_positions": metadata.integer("context_length"),
        "n_embd": metadata.integer("embedding_length"),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "n_inner": metadata.integer("feed_forward_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not metadata.has("output.weight"),
    } | _special_ids(metadata.file.fields)


def _llama_config(metadata: _Metadata) -> dict[str, Any]:
    """A config.json for Llama and the architectures derived from it."""
    d_model, n_head = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", d_model // n_head)
    theta = metadata.number("rope.freq_base", 10_000.0)
    config = {
        "model_type": metadata.architecture,
        "vocab_size": metadata.rows("token_embd.weight"),
        "max_position_embeddings": metadata.integer("context_length"),
        "hidden_size": d_model,
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "tie_word_embeddings": not metadata.has("output.weight"),
    } | _special_ids(metadata.file.fields)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key, head_dim) != head_dim:
            raise metadata.refused(
                f"has {metadata.architecture}.{key} = {metadata.get(key)}; only {head_dim} is supported"
            )
    if scaling := _rope_scaling(metadata, theta, head_dim):
        config["rope_scaling"] = scaling
    window = metadata.integer("attention.sliding_window", 0)
    if metadata.architecture == "gemma3":
        return config | _gemma3_settings(metadata, config, window)
    if metadata.architecture == "llama" and window:
        return config | {"model_type": "mistral", "sliding_window": window}
    biases = {"attention_bias": metadata.has("blk.0.attn_q.bias"), "mlp_bias": metadata.has("blk.0.ffn_up.bias")}
    return config | (biases if metadata.architecture == "llama" else {})


def _gemma3_settings(metadata: _Metadata, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The additional settings of Gemma 3."""
    # The 27B model, which llama.cpp recognises by its number of layers, has another scale of queries.
    is_27b = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    settings = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "sliding_window_pattern": metadata.integer("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if metadata.get(name):
            settings[name] = metadata.number(name)
    return settings


def _rope_scaling(metadata: _Metadata, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The scaling of rotary positions, or None."""
    if metadata.has(ROPE_FACTORS):
        return _llama3_scaling(metadata, theta, head_dim)
    if metadata.number("rope.scale_linear", 1.0) != 1:
        raise metadata.refused("was made by an old converter (rope.scale_linear); convert the model again")
    prefix = f"{metadata.architecture}.rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in metadata.file.fields.items() if key.startswith(prefix)}
    kind = given.pop("type", "none")
    if kind == "none":
        return None
    names = ROPE_SCALING.get(kind)
    if names is None:
        raise metadata.refused(f"has rotary positions of type {kind!r}; supported are none, {', '.join(ROPE_SCALING)}")
    if unsupported := [key for key, value in given.items() if key not in names and value not in (0, 1)]:
        raise metadata.refused(f"has settings of rotary positions that are not supported: {', '.join(unsupported)}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if "original_context_length" in given:
        scaling["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
    for key in ("yarn_beta_fast", "yarn_beta_slow"):
        if key in given:
            scaling[key.removeprefix("yarn_")] = metadata.number(f"rope.scaling.{key}")
    return scaling


def _llama3_scaling(metadata: _Metadata, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The settings of Llama 3's scaling, of which the file has only the results, one per frequency."""
    factors = np.empty(metadata.file.shapes[ROPE_FACTORS], np.float32)
    metadata.file.fill(ROPE_FACTORS, factors)
    if (factors == 1).all():
        return None
    if metadata.file.fields.get(f"{metadata.architecture}.rope.scaling.type", "none") != "none":
        raise metadata.refused(f"scales rotary positions twice, by {ROPE_FACTORS} and by rope.scaling.type")
    factor = float(factors.max())
    context = metadata.integer("rope.scaling.original_context_length", 8192)
    rope = RopeConfig(theta=theta, factor=factor)
    expected = plain(theta, head_dim) / llama3(rope, head_dim, context)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise metadata.refused(f"has rotary positions that are not scaled as Llama 3's ({ROPE_FACTORS})")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": context,
    }
