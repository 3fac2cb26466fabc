"""The KV cache: keys and values of the tokens seen so far, an explicit argument and result of the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (B, S, G, K). Slot s holds the token at position s of its sequence."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array


Cache = tuple[LayerCache, ...]
"""One LayerCache a layer. Separate buffers, because XLA updates each in place; slices of a stacked one are copied."""


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of up to `length` tokens, in the model's compute dtype."""
    shape = (batch, length, config.n_head, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.n_layer)
    )


def update(cache: LayerCache, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> LayerCache:
    """The cache with T new tokens written from position start_B (int32) of each sequence on."""

    def write(buffer_BSGK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
        new_BTGK = new_BTGK.astype(buffer_BSGK.dtype)
        if buffer_BSGK.shape[0] == 1:  # One sequence: a plain slice update, which XLA does in place everywhere.
            return jax.lax.dynamic_update_slice(buffer_BSGK, new_BTGK, (0, start_B[0], 0, 0))
        return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0, 0)))(
            buffer_BSGK, new_BTGK, start_B
        )

    return LayerCache(write(cache.k_BSGK, k_BTGK), write(cache.v_BSGK, v_BTGK))
