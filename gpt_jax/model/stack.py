"""Runs the L blocks of a model one after the other: unrolled or scanned, rematerialised, gathered, or with a cache.

The format does not depend on that: the parameters of all layers are always stacked on a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.config import ModelConfig, RematName
from gpt_jax.model.cache import Cache
from gpt_jax.model.sharding import for_use, gathers_again, keep_all_but_gathered, to_storage

Layers = Any
"""The parameters of the blocks: one tree whose leaves have the layers on their first axis, or a tuple of L trees."""


def run(
    block: Callable[[Any, jax.Array, int | jax.Array, bool], jax.Array],
    layers: Layers,
    x_BTD: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    """The output of all blocks for x, run as `config` says. `block(params, x_BTD, i, sliding)` is the i-th."""
    c = config

    def layer(params: Any, x_BTD: jax.Array, i: int | jax.Array, sliding: bool) -> jax.Array:
        return block(for_use(params, c.dtype), x_BTD, i, sliding)

    layer = rematerialised(layer, c.remat)
    if c.unroll:
        for i, params in enumerate(unstack(layers, c.n_layer)):
            x_BTD = layer(to_storage(params), x_BTD, i, c.sliding[i])
        return x_BTD

    # Layers with a sliding window and layers without are different programs. The scan goes over whole periods of
    # their pattern, and the remaining layers follow.
    period = len(c.window_pattern) if c.window else 1
    n_scanned = c.n_layer // period * period

    def consecutive(x_BTD: jax.Array, xs: tuple[Any, jax.Array], n: int) -> tuple[jax.Array, None]:
        """Runs layers `first` to `first + n - 1`."""
        stacked, first = xs
        for i, params in enumerate(unstack(stacked, n)):
            x_BTD = layer(to_storage(params), x_BTD, first + i, c.sliding[i])  # The backward pass keeps them as stored.
        return x_BTD, None

    periods = jax.tree.map(lambda x: x[:n_scanned].reshape(-1, period, *x.shape[1:]), layers)
    x_BTD, _ = jax.lax.scan(
        functools.partial(consecutive, n=period), x_BTD, (periods, jnp.arange(0, n_scanned, period))
    )
    if n_scanned < c.n_layer:
        rest = jax.tree.map(lambda x: x[n_scanned:], layers)
        x_BTD, _ = consecutive(x_BTD, (rest, jnp.int32(n_scanned)), c.n_layer - n_scanned)
    return x_BTD


def run_cached(
    block: Callable[..., tuple[jax.Array, Any]], layers: Layers, x_BTD: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """The output of all blocks for x, and the new cache. `block(params, x_BTD, sliding, layer_cache)` returns both."""
    new_cache = []
    block = jax.jit(block, static_argnums=2)  # So that layers are traced once, and not each by itself.
    for params, layer_cache, sliding in zip(unstack(layers, config.n_layer), cache, config.sliding, strict=True):
        if gathers_again():  # Otherwise XLA gathers all layers together, before the loop over tokens.
            params, x_BTD = jax.lax.optimization_barrier((params, x_BTD))
        x_BTD, updated = block(for_use(params, config.dtype), x_BTD, sliding, layer_cache)
        new_cache.append(updated)
    return x_BTD, tuple(new_cache)


def rematerialised(layer: Any, policy: RematName) -> Any:
    """`layer`, whose activations the backward pass keeps or computes again, as the policy's name says."""
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_saveable,
        "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if policy == "none" and not gathers_again():
        return layer
    return jax.checkpoint(layer, policy=policies.get(policy, keep_all_but_gathered), static_argnums=3)


def unstack(layers: Layers, n_layer: int) -> tuple[Any, ...]:
    """The parameters of each layer; those that are unstacked already stay as they are.

    `split` rather than indexing: its transpose is one concatenation, that of L slices is a sum of L padded arrays.
    """
    if isinstance(layers, tuple):
        return layers
    leaves, tree = jax.tree.flatten(layers)
    split = [[part[0] for part in jax.lax.split(leaf, (1,) * n_layer)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, layer_leaves) for layer_leaves in zip(*split, strict=True))
