"""The tiny models that a GPU runs, in bfloat16 and by cuDNN's attention, and what they are compared with."""

import dataclasses

from gpt_jax.config import ModelConfig
from tests import tiny

GPT2 = dataclasses.replace(
    tiny.GPT2, context_length=128, n_head=2, d_model=128, dtype="bfloat16", attention="cudnn", loss_chunk=300
)
LLAMA = dataclasses.replace(
    tiny.LLAMA,
    context_length=129,
    n_head=4,
    d_model=96,
    d_head=64,
    d_ff=128,
    window=48,
    window_pattern="sf",
    dtype="bfloat16",
    attention="cudnn",
)
"""With all that the family has, a window in one of two layers, and an odd context."""

MODELS = {"gpt2": GPT2, "llama": LLAMA}


def in_float32(config: ModelConfig) -> ModelConfig:
    """The same model by the formula, in float32."""
    return dataclasses.replace(config, dtype="float32", attention="xla")
