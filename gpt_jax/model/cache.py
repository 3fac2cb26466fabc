"""The KV cache: keys and values of the tokens seen so far, an explicit argument and result of the model."""

import functools
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt_jax.config import ModelConfig
from gpt_jax.model.weight import LEAST_STEP


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (X, S, K), with one row per key/value head of each sequence, X = B * G; of all
    S places of a sequence, or of those after the other parts of a cache.

    On a mesh that divides the heads, the rows of a device are together, those of its heads of all sequences.

    The first place of the first part is that of position 0. A head's places are contiguous, and B and G form one axis:
    otherwise XLA:CPU copies the whole cache for every token, to transpose it or to drop a B of 1 (GPT-2 124M with 256
    places: 3.0 to 1.2 ms a token at batch 1, 9.0 to 7.3 at batch 8).

    Those in int8 have a scale each, float32, which is NaN where one of a key's numbers is NaN.
    """

    k_XSK: jax.Array
    v_XSK: jax.Array
    k_scale_XS1: jax.Array | None = None
    v_scale_XS1: jax.Array | None = None

    def plain(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """The keys and the values as they are, or in `dtype`, if they are in int8: (X, S, K) both."""
        if self.k_scale_XS1 is None or self.v_scale_XS1 is None:
            return self.k_XSK, self.v_XSK
        return (self.k_XSK * self.k_scale_XS1).astype(dtype), (self.v_XSK * self.v_scale_XS1).astype(dtype)


Parts = tuple[LayerCache, ...]
"""The cache of one layer, its places divided into parts: those that no sequence has come to are not read."""

Cache = tuple[Parts, ...]
"""One cache per layer. XLA updates separate buffers in place; it would copy the slices of a stacked one."""


def init_cache(config: ModelConfig, batch: int, *sizes: int) -> Cache:
    """An empty cache for `batch` sequences, in parts of so many tokens, in the dtype that the model says."""

    def empty(size: int) -> LayerCache:
        shape = batch * config.kv_heads, size, config.head_dim
        if config.cache_dtype == "int8":
            scales = [jnp.zeros((*shape[:2], 1), jnp.float32) for _ in range(2)]
            return LayerCache(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8), *scales)
        return LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return tuple(tuple(map(empty, sizes)) for _ in range(config.n_layer))


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
    if config.cache_dtype == "int8":
        each = config.head_dim + jnp.dtype(jnp.float32).itemsize
    else:
        each = config.head_dim * jnp.dtype(config.dtype).itemsize
    return 2 * config.n_layer * config.kv_heads * length * each


def update(parts: Parts, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> Parts:
    """The cache with T new tokens of each sequence written to it, from position start_B (int32) on. With several parts,
    T is 1."""
    B, T, G, K = k_BTGK.shape

    def write(buffer_XSK: jax.Array, new_XTK: jax.Array, first: int) -> jax.Array:
        if len(parts) > 1:
            at_X = jnp.repeat(start_B - first, G)
            at_X = jnp.where(at_X < 0, buffer_XSK.shape[1], at_X)  # What is of another part is dropped.
            return buffer_XSK.at[jnp.arange(B * G), at_X].set(new_XTK[:, 0], mode="drop")
        if B == 1:  # One sequence: a plain slice update, which XLA does in place everywhere.
            return jax.lax.dynamic_update_slice(buffer_XSK, new_XTK, (0, start_B[0], 0))
        return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))(
            buffer_XSK, new_XTK, jnp.repeat(start_B, G)
        )

    k_XTK, v_XTK = (x_BTGK.swapaxes(1, 2).reshape(B * G, T, K) for x_BTGK in (k_BTGK, v_BTGK))
    if parts[0].k_scale_XS1 is None:
        new = LayerCache(*(x_XTK.astype(parts[0].k_XSK.dtype) for x_XTK in (k_XTK, v_XTK)))
    else:
        (k_XTK, k_scale_XT1), (v_XTK, v_scale_XT1) = rounded(k_XTK), rounded(v_XTK)
        new = LayerCache(k_XTK, v_XTK, k_scale_XT1, v_scale_XT1)
    return tuple(
        jax.tree.map(functools.partial(write, first=first), part, new)
        for part, first in zip(parts, starts(parts), strict=True)
    )


def rounded(x_XTK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors in int8, and their scales, float32 (X, T, 1): the largest number of each becomes 127."""
    scale_XT1 = jnp.max(jnp.abs(x_XTK), axis=-1, keepdims=True).astype(jnp.float32) / 127
    return jnp.round(x_XTK / jnp.maximum(scale_XT1, LEAST_STEP)).astype(jnp.int8), scale_XT1
