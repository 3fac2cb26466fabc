"""Tiny models, their parameters and their data, shared by the tests; a test replaces the fields that it is about.

All compute in float32. `tests.commands.TINY` has the flags of a tiny training; `tests.interop.models.publish` writes a
model in the format of published ones.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import LoraConfig, ModelConfig
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.tokenizer.bytes import ByteTokenizer

ONE_LAYER = ModelConfig(
    vocab_size=ByteTokenizer().vocab_size,
    context_length=16,
    n_layer=1,
    n_head=2,
    d_model=16,
    dtype="float32",
    attention="block_causal",
)
"""GPT-2's architecture in the size that compiles soonest, for tests of the code around a model."""

GPT2 = dataclasses.replace(ONE_LAYER, context_length=32, n_layer=2, n_head=4, d_model=32)
LLAMA = dataclasses.replace(
    GPT2,
    n_kv_head=2,  # Grouped queries.
    d_ff=48,
    positions="rotary",
    norm="rms",
    activation="silu",
    gated=True,
    bias=False,
    tied_head=False,
)
GEMMA = dataclasses.replace(
    LLAMA,
    n_layer=5,  # A scan over groups of three layers leaves two over.
    window=6,
    window_pattern="ssf",
    post_norm=True,
    qk_norm=True,
    scale_embeddings=True,
    query_scale=0.3,
)
"""Sliding windows in two of three layers, norms after attention and MLP, and norms of queries and keys."""
ADAPTED = dataclasses.replace(LLAMA, lora=LoraConfig(rank=2))

ARCHITECTURES = {"gpt2": GPT2, "llama": LLAMA, "gemma": GEMMA, "adapted": ADAPTED}


def initial_params(config: ModelConfig) -> Params:
    """The initial parameters, made by one program, since separate operations take seconds."""
    return jax.jit(lambda: init_params(GPT(config), jax.random.key(0)))()


def random_params(config: ModelConfig) -> Params:
    """Random parameters, so that all of them matter: initial biases and adapters are 0, initial scales 1."""
    rng = np.random.default_rng(1)
    params = initial_params(config)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)


def uneven_params(config: ModelConfig, factor: float = 8) -> Params:
    """Parameters far from their small initial values, so that some tokens are much likelier than others. Biases and the
    halves of adapters that begin as 0 are first made as large as initial weights, so that they matter, too."""
    rng = np.random.default_rng(1)

    def uneven(x: jax.Array) -> jax.Array:
        return factor * (x if x.any() else jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype))

    return jax.tree.map(uneven, initial_params(config))


def byte_data(folder: Path) -> Path:
    """A data folder within `folder`. Its splits have several documents, and end within a window of 16 tokens."""
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["on", "a", "mat", "语言", "rain"], 12)), encoding="utf-8")
    out = folder / "prepared"
    prepare(PrepareArgs(source=(str(folder),), out=out, tokenizer="bytes", val_fraction=0.2, workers=1))
    return out
