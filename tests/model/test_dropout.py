"""Dropout keeps the mean, and no two places of a model drop by the same keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoraConfig
from gpt_jax.model.forward import forward, init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.model.layers import dropout
from tests import tiny


def test_what_is_kept_is_scaled_up() -> None:
    dropped = np.asarray(dropout(jnp.ones((2, 10_000)), 0.25, jax.random.split(jax.random.key(0), 2)))
    assert set(dropped.reshape(-1).tolist()) == {0, np.float32(1) / np.float32(0.75)}
    np.testing.assert_allclose((dropped == 0).mean(axis=1), 0.25, atol=0.02)
    assert not np.array_equal(*dropped)


def test_every_place_drops_by_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings; in each layer the weights of each block of queries, both outputs, and the adapters' inputs."""
    lora = LoraConfig(rank=1, dropout=0.5)
    config = dataclasses.replace(tiny.LLAMA, dropout=0.5, lora=lora, context_length=130)
    params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    seen: list[jax.Array] = []

    def recorded(x: jax.Array, rate: float, keys_B: jax.Array) -> jax.Array:
        seen.append(jax.random.key_data(keys_B))
        return x

    for module in ("gpt", "attention", "lora"):
        monkeypatch.setattr(f"gpt_jax.model.{module}.dropout", recorded)
    monkeypatch.setattr(jax, "checkpoint", lambda function: function)  # Keys made inside could not be returned.

    @jax.jit
    def keys_of_all_places(keys_B: jax.Array) -> list[jax.Array]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
        forward(GPT(config), zeros, jnp.zeros((2, 130), jnp.int32), keys_B)
        return seen

    keys = np.asarray(keys_of_all_places(jax.random.split(jax.random.key(0), 2))).reshape(len(seen), -1)
    blocks = 3  # Of 64 queries each.
    assert len(keys) == 1 + config.n_layer * (blocks + 2 + len(lora.targets))
    assert len(np.unique(keys, axis=0)) == len(keys)
