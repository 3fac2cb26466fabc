"""The KV cache: keys and values of the tokens seen so far, an explicit argument and result of the model."""

from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (X, S, K), with one row per key/value head of each sequence, X = B * G; of all
    S places of a sequence, or of those after the other parts of a cache.

    On a mesh that divides the heads, the rows of a device are together, those of its heads of all sequences.

    The first place of the first part is that of position 0. A head's places are contiguous, and B and G form one axis:
    otherwise XLA:CPU copies the whole cache for every token, to transpose it or to drop a B of 1 (GPT-2 124M with 256
    places: 3.0 to 1.2 ms a token at batch 1, 9.0 to 7.3 at batch 8).
    """

    k_XSK: jax.Array
    v_XSK: jax.Array


Parts = tuple[LayerCache, ...]
"""The cache of one layer, its places divided into parts: those that no sequence has come to are not read."""

Cache = tuple[Parts, ...]
"""One cache per layer. XLA updates separate buffers in place; it would copy the slices of a stacked one."""


def init_cache(config: ModelConfig, batch: int, *sizes: int) -> Cache:
    """An empty cache for `batch` sequences, in parts of so many tokens, in the model's compute dtype."""

    def empty(size: int) -> jax.Array:
        return jnp.zeros((batch * config.kv_heads, size, config.head_dim), config.dtype)

    return tuple(tuple(LayerCache(empty(size), empty(size)) for size in sizes) for _ in range(config.n_layer))


def places(cache: Cache) -> int:
    """The places of a sequence."""
    return sum(sizes(cache[0]))


def sizes(parts: Parts) -> list[int]:
    """The places of a sequence in each part."""
    return [part.k_XSK.shape[1] for part in parts]


def starts(parts: Parts) -> list[int]:
    """The position that each part begins with."""
    return list(accumulate(sizes(parts), initial=0))[:-1]


def cache_bytes(config: ModelConfig, length: int) -> int:
    """The bytes that a sequence of so many tokens takes."""
    return 2 * config.n_layer * config.kv_heads * length * config.head_dim * jnp.dtype(config.dtype).itemsize


def update(parts: Parts, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> Parts:
    """The cache with T new tokens of each sequence written to it, from position start_B (int32) on. With several parts,
    T is 1."""
    B, T, G, K = k_BTGK.shape

    def write(buffer_XSK: jax.Array, new_BTGK: jax.Array, first: int) -> jax.Array:
        new_XTK = new_BTGK.swapaxes(1, 2).reshape(B * G, T, K).astype(buffer_XSK.dtype)
        if len(parts) > 1:
            at_X = jnp.repeat(start_B - first, G)
            at_X = jnp.where(at_X < 0, buffer_XSK.shape[1], at_X)  # What is of another part is dropped.
            return buffer_XSK.at[jnp.arange(B * G), at_X].set(new_XTK[:, 0], mode="drop")
        if B == 1:  # One sequence: a plain slice update, which XLA does in place everywhere.
            return jax.lax.dynamic_update_slice(buffer_XSK, new_XTK, (0, start_B[0], 0))
        return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))(
            buffer_XSK, new_XTK, jnp.repeat(start_B, G)
        )

    return tuple(
        LayerCache(write(part.k_XSK, k_BTGK, first), write(part.v_XSK, v_BTGK, first))
        for part, first in zip(parts, starts(parts), strict=True)
    )
