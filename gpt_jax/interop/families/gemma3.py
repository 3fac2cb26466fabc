"""Gemma 3 for text: five sliding-window layers to one full layer, norms also after each half of a block, GeGLU."""

from dataclasses import replace

from gpt_jax.config import ModelConfig, check
from gpt_jax.interop.families import llama
from gpt_jax.interop.families.family import Settings
from gpt_jax.interop.families.rope import first_of
from gpt_jax.interop.families.windows import from_layer_types, to_layer_types
from gpt_jax.interop.layout import OffsetByOne


def read_more(settings: Settings) -> Settings:
    """The full layers, which are every sixth or those in `layer_types`, and the scale of queries."""
    period, n_layer = settings.get("sliding_window_pattern", 6), settings.get("num_hidden_layers", 26)
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layer)]
    window = from_layer_types(
        first_of(settings.get("layer_types"), default), n_layer, settings.get("sliding_window", 4096)
    )
    scalar = first_of(settings.get("query_pre_attn_scalar"), 256)
    check(scalar > 0, "query_pre_attn_scalar", scalar, "more than 0")
    return window | {"query_scale": scalar**-0.5}


def write_more(config: ModelConfig) -> Settings:
    """The inverse of `read_more`."""
    scalar = round(config.query_scale**-2, 6)
    return {
        "sliding_window": config.window or None,
        "layer_types": to_layer_types(config),
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
    }


FAMILY = replace(
    llama.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    settings={
        **llama.FAMILY.settings,
        "vocab_size": ("vocab_size", 262208),
        "max_position_embeddings": ("context_length", 131072),
        "hidden_size": ("d_model", 2304),
        "num_hidden_layers": ("n_layer", 26),
        "num_attention_heads": ("n_head", 8),
        "num_key_value_heads": ("n_kv_head", 4),
        "head_dim": ("d_head", 256),
        "intermediate_size": ("d_ff", 9216),
        "tie_word_embeddings": ("tied_head", True),
    },
    shared={**llama.FAMILY.shared, "qk_norm": True, "post_norm": True, "scale_embeddings": True},
    only={
        "attention_bias": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    tensors={
        **llama.FAMILY.tensors,
        "layers/norm_1/scale": OffsetByOne("model.layers.{i}.input_layernorm.weight"),
        "layers/attention/q_norm/scale": OffsetByOne("model.layers.{i}.self_attn.q_norm.weight"),
        "layers/attention/k_norm/scale": OffsetByOne("model.layers.{i}.self_attn.k_norm.weight"),
        "layers/post_norm_1/scale": OffsetByOne("model.layers.{i}.post_attention_layernorm.weight"),
        "layers/norm_2/scale": OffsetByOne("model.layers.{i}.pre_feedforward_layernorm.weight"),
        "layers/post_norm_2/scale": OffsetByOne("model.layers.{i}.post_feedforward_layernorm.weight"),
        "final_norm/scale": OffsetByOne("model.norm.weight"),
    },
    rope_theta=1_000_000.0,
    rope_local_theta=10_000.0,
    read_more=read_more,
    write_more=write_more,
)
