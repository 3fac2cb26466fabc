"""Small models of random weights in the form in which models are published, made without torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.files import save_json
from gpt_jax.interop.families import family_for
from gpt_jax.interop.save import generation_settings, model_settings, write_model
from gpt_jax.model.gpt import GPT, Params, init_params
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.export import export_tokenizer

LLAMA = ModelConfig(
    vocab_size=ByteTokenizer().vocab_size,
    context_length=32,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    d_model=32,
    d_ff=48,
    positions="rotary",
    norm="rms",
    activation="silu",
    gated=True,
    bias=False,
    tied_head=False,
    dtype="float32",
    attention="xla",
)


def random_params(config: ModelConfig) -> Params:
    """Parameters not as at the beginning: everything counts, norms and adapters too."""
    rng = np.random.default_rng(1)
    params = jax.jit(lambda: init_params(GPT(config), jax.random.key(0)))()
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)


def publish(folder: Path, config: ModelConfig = LLAMA) -> Params:
    """Writes a folder with a model whose tokens are bytes; returns the parameters."""
    family = family_for(config)
    assert family is not None
    params, tokenizer = random_params(config), ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, family, config, params, "float32")
    save_json(folder / "config.json", model_settings(family, config, tokenizer, "float32"))
    save_json(folder / "generation_config.json", generation_settings(tokenizer))
    export_tokenizer(tokenizer, folder, config.context_length)
    return params
