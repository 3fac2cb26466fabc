"""Mistral: Llama with a sliding window in all layers, or in none."""

from dataclasses import replace

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families import llama
from gpt_jax.interop.families.family import Settings


def read_window(settings: Settings) -> Settings:
    """The window of all layers; null means none."""
    return {"window": settings.get("sliding_window", 4096) or 0}


def write_window(config: ModelConfig) -> Settings:
    """The inverse of `read_window`."""
    return {"sliding_window": config.window or None}


FAMILY = replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings={
        **llama.FAMILY.settings,
        "max_position_embeddings": ("context_length", 131072),
        "num_key_value_heads": ("n_kv_head", 8),
        "intermediate_size": ("d_ff", 14336),
    },
    read_more=read_window,
    write_more=write_window,
)
