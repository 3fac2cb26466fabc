import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LORA_TARGETS, LoraConfig
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.lora import fold, join, split
from tests.interop.models import LLAMA
from tests.tiny import random_params


def logits(model: GPT, params: Params, tokens: jax.Array) -> np.ndarray:
    return np.asarray(jitted_logits(model, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def jitted_logits(model: GPT, params: Params, tokens: jax.Array) -> jax.Array:
    return jax.vmap(lambda hidden: logits_NV(model, params, hidden))(forward(model, params, tokens))


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("qkv",), ("gate", "down")], ids=["all", "qkv", "gate-down"])
def test_folded_adapters_compute_what_adapters_do(rng: np.random.Generator, targets: tuple[str, ...]) -> None:
    """Logits within 1e-5, with adapters far from their start."""
    config = dataclasses.replace(LLAMA, lora=LoraConfig(rank=3, alpha=5.0, targets=targets))
    params = random_params(config)
    tokens = jnp.asarray(rng.integers(0, LLAMA.vocab_size, (2, 32)))
    adapted = logits(GPT(config), params, tokens)
    folded = fold(params, config.lora)
    assert jax.tree.map(np.shape, folded) == jax.tree.map(np.shape, random_params(LLAMA))
    np.testing.assert_allclose(logits(GPT(LLAMA), folded, tokens), adapted, atol=1e-5, rtol=0)
    without = logits(GPT(LLAMA), split(params)[1], tokens)
    assert np.abs(without - adapted).max() > 0.01


def test_split_and_join_are_inverse() -> None:
    config = dataclasses.replace(LLAMA, lora=LoraConfig(rank=2, targets=("out", "up")))
    params = random_params(config)
    adapters, rest = split(params)
    assert set(adapters["layers"]) == {"attention", "mlp"}
    assert set(adapters["layers"]["mlp"]) == {"up"}
    assert set(adapters["layers"]["mlp"]["up"]) == {"lora_a", "lora_b"}
    assert jax.tree.map(np.shape, rest) == jax.tree.map(np.shape, random_params(LLAMA))
    for joined in (join(adapters, rest), join(rest, adapters)):
        jax.tree.map(np.testing.assert_array_equal, joined, params)
    with pytest.raises(ValueError, match="same leaf"):
        join(params, params)
