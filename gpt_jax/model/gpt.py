"""GPT-2 (Radford et al. 2019) as linen modules: pre-layer-norm blocks, learned positions, GELU, a tied head.

The parameter tree, with the L layers stacked on a leading axis:

    tokens_VD, positions_TD
    layers: norm_1, attention: {qkv, out}, norm_2, mlp: {up, down}
    final_norm
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig, RematName
from gpt_jax.model import cache as kv
from gpt_jax.model.attention import causal_attention, masked_attention
from gpt_jax.model.layers import LayerNorm, Linear, dropout, fold_in

Params = dict[str, Any]

INIT_STD = 0.02  # GPT-2's, for every matrix and embedding.


class Attention(nn.Module):
    """Causal multi-head self-attention: over its own input, or over the cache and its input when there is a cache.

    The columns of the qkv kernel are grouped by key/value head: for each of the G groups its R query heads, then its
    key head, then its value head. So one matrix product makes all three, and any split of the columns into whole
    groups is a split of the heads.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, keys_B: jax.Array | None, cache: kv.LayerCache | None, start_B: jax.Array | None
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        c = self.config
        B, T, D = x_BTD.shape
        H, G, K = c.n_head, c.n_head, c.head_dim
        R = H // G

        qkv = Linear(G * (R + 2) * K, c.bias, INIT_STD, c.dtype, name="qkv")(x_BTD).reshape(B, T, G, R + 2, K)
        q_BTHK = qkv[:, :, :, :R].reshape(B, T, H, K)
        k_BTGK, v_BTGK = qkv[:, :, :, R], qkv[:, :, :, R + 1]

        if cache is None:
            out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, c, fold_in(keys_B, 0))
        else:
            assert start_B is not None
            cache = kv.update(cache, k_BTGK, v_BTGK, start_B)
            key_positions_S = jnp.arange(cache.k_BSGK.shape[1])
            mask_BTS = key_positions_S <= (start_B[:, None] + jnp.arange(T))[:, :, None]
            out_BTHK = masked_attention(q_BTHK, cache.k_BSGK, cache.v_BSGK, mask_BTS)

        residual_std = INIT_STD / np.sqrt(2 * c.n_layer)
        out_BTD = Linear(D, c.bias, residual_std, c.dtype, name="out")(out_BTHK.reshape(B, T, H * K))
        return dropout(out_BTD, c.dropout, fold_in(keys_B, 1)), cache


class MLP(nn.Module):
    """The feed-forward layer: D to F, GELU in its tanh form (Hendrycks and Gimpel 2016), F to D."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        c = self.config
        x_BTF = nn.gelu(Linear(c.ff_dim, c.bias, INIT_STD, c.dtype, name="up")(x_BTD), approximate=True)
        residual_std = INIT_STD / np.sqrt(2 * c.n_layer)
        out_BTD = Linear(c.d_model, c.bias, residual_std, c.dtype, name="down")(x_BTF)
        return dropout(out_BTD, c.dropout, fold_in(keys_B, 2))


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        keys_B: jax.Array | None = None,
        cache: kv.LayerCache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        c = self.config
        norm_BTD = LayerNorm(c.bias, c.norm_eps, c.dtype, name="norm_1")(x_BTD)
        out_BTD, cache = Attention(c, name="attention")(norm_BTD, keys_B, cache, start_B)
        x_BTD = x_BTD + out_BTD
        norm_BTD = LayerNorm(c.bias, c.norm_eps, c.dtype, name="norm_2")(x_BTD)
        return x_BTD + MLP(c, name="mlp")(norm_BTD, keys_B), cache


class GPT(nn.Module):
    """Token ids to hidden states. `config` is resolved: its vocabulary, dtype and attention are no longer "auto"."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        keys_B: jax.Array | None = None,
        cache: kv.Cache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """The hidden states (B, T, D) after the final norm, and the cache with these tokens in it.

        tokens_BT: int ids. keys_B: one dropout key a sequence; None: no dropout. cache, start_B: with a cache, the
        tokens stand at positions start_B to start_B + T - 1 (int32), and attend to what the cache holds before them.
        """
        c = self.config
        tokens_VD = self.param("tokens_VD", nn.initializers.normal(INIT_STD), (c.vocab_size, c.d_model))
        positions_TD = self.param("positions_TD", nn.initializers.normal(INIT_STD), (c.context_length, c.d_model))

        T = tokens_BT.shape[1]
        if start_B is None:
            position_embeddings = positions_TD[:T]
        else:
            position_embeddings = positions_TD[start_B[:, None] + jnp.arange(T)]
        x_BTD = (tokens_VD[tokens_BT] + position_embeddings).astype(c.dtype)
        x_BTD = dropout(x_BTD, c.dropout, fold_in(keys_B, 0))
        x_BTD, cache = self.run_layers(x_BTD, fold_in(keys_B, 1), cache, start_B)
        return LayerNorm(c.bias, c.norm_eps, c.dtype, name="final_norm")(x_BTD), cache

    def run_layers(
        self, x_BTD: jax.Array, keys_B: jax.Array | None, cache: kv.Cache | None, start_B: jax.Array | None
    ) -> tuple[jax.Array, kv.Cache | None]:
        """All blocks, unrolled or scanned. One parameter tree serves both: how to run is not a matter of format."""
        c = self.config
        block = Block(c, parent=None)

        def init_layers(key: jax.Array) -> Params:
            return jax.vmap(lambda key: block.init(key, x_BTD)["params"])(jax.random.split(key, c.n_layer))

        def layer(params: Params, x_BTD: jax.Array, i: int | jax.Array) -> jax.Array:
            return block.apply({"params": params}, x_BTD, fold_in(keys_B, i))[0]

        if self.is_initializing():
            layers = self.param("layers", init_layers)
        else:
            layers = self.get_variable("params", "layers")

        if cache is not None:
            new_cache = []
            for params, layer_cache in zip(unstack(layers, c.n_layer), cache, strict=True):
                x_BTD, updated = cast(Any, block.apply({"params": params}, x_BTD, None, layer_cache, start_B))
                new_cache.append(updated)
            return x_BTD, tuple(new_cache)
        layer = rematerialised(layer, c.remat)
        if c.unroll:
            for i, params in enumerate(unstack(layers, c.n_layer)):
                x_BTD = layer(params, x_BTD, i)
            return x_BTD, None
        x_BTD, _ = jax.lax.scan(
            lambda x_BTD, xs: (layer(xs[0], x_BTD, xs[1]), None), x_BTD, (layers, jnp.arange(c.n_layer))
        )
        return x_BTD, None


def init_params(model: GPT, key: jax.Array) -> Params:
    """The parameters before training, float32, layers stacked."""
    # One token is enough to find all shapes; the fused attentions, which work on whole blocks, are not made for one.
    plain = GPT(dataclasses.replace(model.config, attention="xla"))
    return cast(Params, plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def forward(model: GPT, params: Params, tokens_BT: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """The hidden states (B, T, D) of whole sequences, after the final norm; with dropout, if there are keys for it."""
    hidden_BTD, _ = cast(tuple[jax.Array, None], model.apply({"params": params}, tokens_BT, keys_B))
    return hidden_BTD


def forward_cached(
    model: GPT, params: Params, tokens_BT: jax.Array, cache: kv.Cache, start_B: jax.Array
) -> tuple[jax.Array, kv.Cache]:
    """The hidden states (B, T, D) of tokens that go on from position start_B, and the cache with them in it."""
    return cast(tuple[jax.Array, kv.Cache], model.apply({"params": params}, tokens_BT, None, cache, start_B))


def rematerialised(layer: Any, policy: RematName) -> Any:
    """`layer` with its activations kept for the backward pass, or computed again, as the policy's name says."""
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_saveable,
        "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    return layer if policy == "none" else jax.checkpoint(layer, policy=policies[policy])


def unstack(layers: Any, n_layer: int) -> tuple[Params, ...]:
    """The parameters of each layer; those of a model that is unstacked already, as they are.

    `split` and not indexing: its transpose is one concatenation, where that of L slices is a sum of L padded arrays.
    """
    if isinstance(layers, tuple):
        return layers
    leaves, tree = jax.tree.flatten(layers)
    split = [[part[0] for part in jax.lax.split(leaf, (1,) * n_layer)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, leaves_of_layer) for leaves_of_layer in zip(*split, strict=True))
