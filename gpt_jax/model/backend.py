"""Resolves "auto" in a model's configuration for a device and a length, once, before anything is compiled.

What is resolved holds for the configuration's own `context_length`: whoever changes that resolves again.
"""

import dataclasses
import re

import jax

from gpt_jax import runtime
from gpt_jax.config import AttentionName, ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.kernels import SPLASH_BLOCKS
from gpt_jax.runtime import Hardware

FASTEST: dict[str, AttentionName] = {"gpu": "cudnn", "tpu": "splash", "cpu": "block_causal"}

AMD_WITH_BFLOAT16 = r"gfx(908|90a|94\w|95\w|11\w\w|12\w\w)"
"""The architectures whose matrix cores multiply bfloat16: CDNA, and RDNA from its third generation on."""


def native_bfloat16(on: Hardware) -> bool:
    """True when the device multiplies matrices of bfloat16 by itself: TPUs, NVIDIA GPUs from Ampere on, AMD's CDNA."""
    if on.platform == "gpu":
        return on.capability >= (8, 0) or re.fullmatch(AMD_WITH_BFLOAT16, on.architecture) is not None
    return on.platform == "tpu"


def cudnn_refusal(config: ModelConfig, on: Hardware, context: int) -> str | None:
    """The reason why cuDNN's attention cannot run this model. The widths and versions are those that JAX checks when it
    traces it (`check_is_flash_attention`); any length will do, since `causal_by_cudnn` makes it even."""
    if on.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {on.platform}"
    if not on.capability:
        return f"it needs an NVIDIA GPU, and this is another{f' ({on.architecture})' if on.architecture else ''}"
    if on.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 (Ampere) or more, and this one has {on.architecture}"
    if not on.cudnn:
        return "it needs cuDNN, which JAX does not find"
    if on.capability == (10, 3) and on.cudnn < 91100:
        return "it needs cuDNN 9.11 or later on a GPU of compute capability 10.3"
    if on.deterministic:
        return "XLA_FLAGS ask for deterministic programs, which end in an error when they call it"
    if context > 1:
        return f"it does not divide sequences, and parallel.context = {context}"
    if config.dtype != "bfloat16":
        return f"it computes in bfloat16, not model.dtype = {config.dtype}"
    widest = 256 if on.capability >= (9, 0) else 128
    if config.head_dim > widest or config.head_dim % 8:
        return f"it needs heads of a width of {widest} at most, in steps of 8, not {config.head_dim}"
    if config.dropout:
        return f"it does not drop attention weights, and model.dropout = {config.dropout}"
    return None


def splash_refusal(config: ModelConfig, on: Hardware, context: int) -> str | None:
    """The reason why Splash cannot run this model."""
    if on.platform != "tpu":
        return f"it needs a TPU, and this is {on.platform}"
    if config.context_length % (SPLASH_BLOCKS[-1] * context):
        step = f"{SPLASH_BLOCKS[-1]} x parallel.context {context}" if context > 1 else SPLASH_BLOCKS[-1]
        return f"it needs a context_length in steps of {step}, not {config.context_length}"
    if config.dropout:
        return f"it does not drop attention weights, and model.dropout = {config.dropout}"
    return None


def refusal(backend: AttentionName, config: ModelConfig, on: Hardware, context: int = 1) -> str | None:
    """The reason why `backend` cannot run this model, with each sequence divided over `context` devices; None when it
    can. The dtype is resolved."""
    if backend == "cudnn":
        return cudnn_refusal(config, on, context)
    if backend == "splash":
        return splash_refusal(config, on, context)
    if backend == "block_causal" and context > 1 and config.dropout:
        return f"with parallel.context = {context} it does not drop weights, and model.dropout = {config.dropout}"
    return None


def resolve_attention(config: ModelConfig, on: Hardware, context: int = 1) -> AttentionName:
    """The backend to use: the configured one, or for "auto" the fastest that can run.

    Raises UserError, with the reason, when the configured one cannot run.
    """
    if config.attention == "auto":
        choices: list[AttentionName] = [FASTEST.get(on.platform, "xla"), "block_causal" if context > 1 else "xla"]
        return next((choice for choice in choices if refusal(choice, config, on, context) is None), "xla")
    why = refusal(config.attention, config, on, context)
    if why:
        raise UserError(f"model.attention = {config.attention} cannot run here: {why}; auto takes the fastest that can")
    return config.attention


def resolve(config: ModelConfig, on: Hardware | str, context: int = 1) -> ModelConfig:
    """The configuration with dtype and attention resolved for a device, with each sequence divided over `context`
    devices. on: for cpu and tpu, the name is enough.

    Raises UserError when the configured attention cannot run there.
    """
    on = Hardware(on) if isinstance(on, str) else on
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="bfloat16" if native_bfloat16(on) else "float32")
    return dataclasses.replace(config, attention=resolve_attention(config, on, context))


def resolve_for(config: ModelConfig, device: jax.Device, context: int = 1) -> ModelConfig:
    """`resolve` for a device of this process."""
    return resolve(config, runtime.hardware(device), context)


def fallback(config: ModelConfig, on: Hardware, context: int = 1) -> str:
    """The reason why a resolved configuration has not the fastest attention of the device, for messages; empty when it
    has that one, or the user chose another."""
    fastest = FASTEST.get(on.platform, "xla")
    why = refusal(fastest, config, on, context) if config.attention != fastest else None
    return f"not {fastest}: {why}" if why else ""


def resolved_to(config: ModelConfig, on: Hardware, context: int = 1) -> str:
    """What a configuration was resolved to, for messages: dtype and attention, with the reasons for slower ones."""
    slow = on.platform == "gpu" and config.dtype == "float32" and not native_bfloat16(on)
    why = fallback(config, on, context)
    dtype = f"{config.dtype}{' (the GPU does not multiply bfloat16)' if slow else ''}"
    return f"{dtype}, attention {config.attention}{f' ({why})' if why else ''}"


def least_length(config: ModelConfig) -> int:
    """Lengths of sequences that are multiples of this suit the attention of a resolved configuration: those of cuDNN
    and Splash work on whole blocks. Where devices divide a sequence, each part must be such a length."""
    return SPLASH_BLOCKS[-1] if config.attention in ("cudnn", "splash") else 16
