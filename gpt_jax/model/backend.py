"""Resolves "auto" in a model's configuration for a platform, once, before anything is compiled."""

import dataclasses

from gpt_jax.config import AttentionName, ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.kernels import SPLASH_BLOCKS

CUDNN_MAX_HEAD_DIM = 128


def refusal(backend: AttentionName, config: ModelConfig, platform: str, context: int = 1) -> str | None:
    """The reason why `backend` cannot run this model on `platform` (cpu, gpu or tpu), with each sequence divided over
    `context` devices; None when it can."""
    if backend == "block_causal" and context > 1 and config.dropout:
        return f"with parallel.context = {context} it does not drop weights, and model.dropout = {config.dropout}"
    if backend == "cudnn":
        if platform != "gpu":
            return f"it needs an NVIDIA GPU, and this is {platform}"
        if context > 1:
            return f"it does not divide sequences, and parallel.context = {context}"
        if config.dtype != "bfloat16":
            return f"it computes in bfloat16, not model.dtype = {config.dtype}"
        if config.head_dim > CUDNN_MAX_HEAD_DIM or config.head_dim % 8:
            return f"it needs heads of a width of {CUDNN_MAX_HEAD_DIM} at most, in steps of 8, not {config.head_dim}"
        if config.dropout:
            return f"it does not drop attention weights, and model.dropout = {config.dropout}"
    if backend == "splash":
        if platform != "tpu":
            return f"it needs a TPU, and this is {platform}"
        if config.context_length % (SPLASH_BLOCKS[-1] * context):
            step = f"{SPLASH_BLOCKS[-1]} x parallel.context {context}" if context > 1 else SPLASH_BLOCKS[-1]
            return f"it needs a model.context_length in steps of {step}, not {config.context_length}"
        if config.dropout:
            return f"it does not drop attention weights, and model.dropout = {config.dropout}"
    return None


def resolve_attention(config: ModelConfig, platform: str, context: int = 1) -> AttentionName:
    """The backend to use: the configured one, or for "auto" the fastest that can run.

    Raises UserError, with the reason, when the configured one cannot run.
    """
    if config.attention == "auto":
        fastest: dict[str, AttentionName] = {"gpu": "cudnn", "tpu": "splash", "cpu": "block_causal"}
        choices: list[AttentionName] = [fastest.get(platform, "xla"), "block_causal" if context > 1 else "xla"]
        return next((choice for choice in choices if refusal(choice, config, platform, context) is None), "xla")
    why = refusal(config.attention, config, platform, context)
    if why:
        raise UserError(f"model.attention = {config.attention} cannot run here: {why}; auto takes the fastest that can")
    return config.attention


def resolve(config: ModelConfig, platform: str, context: int = 1) -> ModelConfig:
    """The configuration with dtype and attention resolved for a platform (cpu, gpu or tpu), with each sequence divided
    over `context` devices.

    Raises UserError when the configured attention cannot run there.
    """
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="float32" if platform == "cpu" else "bfloat16")
    return dataclasses.replace(config, attention=resolve_attention(config, platform, context))
