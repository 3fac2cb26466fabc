"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values; upper layers may have a sliding window."""

from dataclasses import replace

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families import llama
from gpt_jax.interop.families.family import Settings
from gpt_jax.interop.families.rope import first_of
from gpt_jax.interop.families.windows import from_layer_types, to_layer_types


def read_window(settings: Settings) -> Settings:
    """The window of the layers from `max_window_layers` on, or of those in `layer_types`."""
    window = settings.get("sliding_window", 4096) if settings.get("use_sliding_window") else 0
    first, n_layer = settings.get("max_window_layers", 28), settings.get("num_hidden_layers", 32)
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layer)]
    return from_layer_types(first_of(settings.get("layer_types"), default), n_layer, window)


def write_window(config: ModelConfig) -> Settings:
    """The inverse of `read_window`."""
    return {
        "use_sliding_window": bool(config.window),
        "sliding_window": config.window or None,
        "layer_types": to_layer_types(config),
    }


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    settings={
        **llama.FAMILY.settings,
        "vocab_size": ("vocab_size", 151936),
        "max_position_embeddings": ("context_length", 32768),
        "intermediate_size": ("d_ff", 22016),
        "num_key_value_heads": ("n_kv_head", 32),
    },
    shared={**llama.FAMILY.shared, "biases": ("qkv",)},
    read_more=read_window,
    write_more=write_window,
)
