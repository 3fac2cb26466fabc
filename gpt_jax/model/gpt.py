"""The GPT as linen modules. GPT-2's architecture and the Llama family's are one, with other values in `ModelConfig`.

The parameter tree, with the L layers stacked on a leading axis; what stands in brackets is there if the configuration
asks for it:

    tokens_VD, [positions_TD], [head_VD]
    layers: norm_1, attention: {qkv, out, [q_norm, k_norm]}, [post_norm_1],
            norm_2, mlp: {[gate], up, down}, [post_norm_2]
    final_norm
"""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig, RematName
from gpt_jax.model import cache as kv
from gpt_jax.model.attention import cached_attention, visible
from gpt_jax.model.kernels import causal_attention
from gpt_jax.model.layers import INIT_STD, RMSNorm, decoding_product, dropout, fold_in, linear, lora_keys, norm
from gpt_jax.model.loss import hide_padding
from gpt_jax.model.rope import rotate
from gpt_jax.model.sharding import constrain, gather, gathers_again, keep_all_but_gathered, store

Params = dict[str, Any]

ACTIVATIONS = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # Hendrycks and Gimpel 2016, its tanh form.
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "relu": nn.relu,
}


class Attention(nn.Module):
    """Causal self-attention: over its own input, or over the cache and its input when there is a cache.

    The columns of the qkv kernel are grouped by key/value head: for each of the G groups its R query heads, then its
    key head, then its value head. So one matrix product makes all three, and any split of the columns into whole
    groups is a split of the heads.
    """

    config: ModelConfig
    sliding: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, keys_B: jax.Array | None, cache: kv.LayerCache | None, start_B: jax.Array | None
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        c = self.config
        B, T, D = x_BTD.shape
        H, G, K = c.n_head, c.kv_heads, c.head_dim
        R = H // G
        window = c.window if self.sliding else 0

        qkv = linear(c, "qkv", G * (R + 2) * K)(x_BTD, lora_keys(c, "qkv", keys_B)).reshape(B, T, G, R + 2, K)
        qkv = constrain(qkv, "BTGRK")
        q_BTHK = qkv[:, :, :, :R].reshape(B, T, H, K)
        k_BTGK, v_BTGK = qkv[:, :, :, R], qkv[:, :, :, R + 1]
        if c.qk_norm:
            q_BTHK = RMSNorm(c.norm_eps, c.dtype, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(c.norm_eps, c.dtype, name="k_norm")(k_BTGK)
        if c.positions == "rotary":
            positions_BT = positions_of(T, start_B)
            q_BTHK = rotate(q_BTHK, positions_BT, c, self.sliding)
            k_BTGK = rotate(k_BTGK, positions_BT, c, self.sliding)
        if c.query_scale:  # In the place of 1 / sqrt(K), by which every attention multiplies.
            q_BTHK = q_BTHK * (c.query_scale * np.sqrt(K)).astype(q_BTHK.dtype)

        if cache is None:
            out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, c, window, fold_in(keys_B, 0))
        else:
            assert start_B is not None
            cache = kv.update(cache, k_BTGK, v_BTGK, start_B)
            distance_BTS = positions_of(T, start_B)[:, :, None] - jnp.arange(cache.k_XSK.shape[1])
            out_BTHK = cached_attention(q_BTHK, cache.k_XSK, cache.v_XSK, visible(distance_BTS, window))

        out_BTD = linear(c, "out", D, residual=True)(out_BTHK.reshape(B, T, H * K), lora_keys(c, "out", keys_B))
        return dropout(out_BTD, c.dropout, fold_in(keys_B, 1)), cache


def positions_of(T: int, start_B: jax.Array | None) -> jax.Array:
    """The positions of T tokens from start_B on, int32 (B, T); without a start, from 0 on, (1, T)."""
    return jnp.arange(T)[None] if start_B is None else start_B[:, None] + jnp.arange(T)


class MLP(nn.Module):
    """The feed-forward layer: D to F, an activation, F to D; or gated, activation(gate) * up (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        x_BTF = linear(c, "up", c.ff_dim)(x_BTD, lora_keys(c, "up", keys_B))
        if c.gated:
            x_BTF = activation(linear(c, "gate", c.ff_dim)(x_BTD, lora_keys(c, "gate", keys_B))) * x_BTF
        else:
            x_BTF = activation(x_BTF)
        x_BTF = constrain(x_BTF, "BTF")
        out_BTD = linear(c, "down", c.d_model, residual=True)(x_BTF, lora_keys(c, "down", keys_B))
        return dropout(out_BTD, c.dropout, fold_in(keys_B, 2))


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    sliding: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        keys_B: jax.Array | None = None,
        cache: kv.LayerCache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        c = self.config
        attention, mlp = Attention(c, self.sliding, name="attention"), MLP(c, name="mlp")
        out_BTD, cache = attention(norm(c, "norm_1")(x_BTD), keys_B, cache, start_B)
        x_BTD = x_BTD + (norm(c, "post_norm_1")(out_BTD) if c.post_norm else out_BTD)
        out_BTD = mlp(norm(c, "norm_2")(x_BTD), keys_B)
        x_BTD = x_BTD + (norm(c, "post_norm_2")(out_BTD) if c.post_norm else out_BTD)
        return constrain(x_BTD, "BTD"), cache


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
        normal = nn.initializers.normal(INIT_STD)
        tokens_VD = self.param("tokens_VD", normal, (c.embedding_rows, c.d_model))
        if not c.tied_head:
            self.param("head_VD", normal, (c.embedding_rows, c.d_model))
        x_BTD = gather({"tokens_VD": tokens_VD}, tokens_VD.dtype)["tokens_VD"][tokens_BT]
        if c.positions == "learned":
            positions_TD = self.param("positions_TD", normal, (c.context_length, c.d_model))
            positions_TD = gather({"positions_TD": positions_TD}, positions_TD.dtype)["positions_TD"]
            T = tokens_BT.shape[1]
            x_BTD = x_BTD + (positions_TD[:T] if start_B is None else positions_TD[positions_of(T, start_B)])
        x_BTD = x_BTD.astype(c.dtype)
        if c.scale_embeddings:
            x_BTD = x_BTD * np.sqrt(c.d_model).astype(x_BTD.dtype)
        x_BTD = constrain(dropout(x_BTD, c.dropout, fold_in(keys_B, 0)), "BTD")
        x_BTD, cache = self.run_layers(x_BTD, fold_in(keys_B, 1), cache, start_B)
        return norm(c, "final_norm")(x_BTD), cache

    def run_layers(
        self, x_BTD: jax.Array, keys_B: jax.Array | None, cache: kv.Cache | None, start_B: jax.Array | None
    ) -> tuple[jax.Array, kv.Cache | None]:
        """All blocks, unrolled or scanned. One parameter tree serves both: how to run is not a matter of format."""
        c = self.config
        blocks = {sliding: Block(c, sliding, parent=None) for sliding in (False, True)}

        def init_layers(key: jax.Array) -> Params:
            return jax.vmap(lambda key: blocks[False].init(key, x_BTD)["params"])(jax.random.split(key, c.n_layer))

        def layer(params: Params, x_BTD: jax.Array, i: int | jax.Array, sliding: bool) -> jax.Array:
            params = gather(params, c.dtype)
            return cast(Any, blocks[sliding].apply({"params": params}, x_BTD, fold_in(keys_B, i)))[0]

        if self.is_initializing():
            layers = self.param("layers", init_layers)
        else:
            layers = self.get_variable("params", "layers")

        if cache is not None:
            new_cache = []
            for params, layer_cache, sliding in zip(unstack(layers, c.n_layer), cache, c.sliding, strict=True):
                block = blocks[sliding]
                x_BTD, updated = cast(Any, block.apply({"params": params}, x_BTD, None, layer_cache, start_B))
                new_cache.append(updated)
            return x_BTD, tuple(new_cache)
        layer = rematerialised(layer, c.remat)
        if c.unroll:
            for i, params in enumerate(unstack(layers, c.n_layer)):
                x_BTD = layer(store(params), x_BTD, i, c.sliding[i])
            return x_BTD, None

        # Layers that slide and layers that do not are different programs: the scan goes over whole periods of their
        # pattern, and what is left of the layers follows.
        period = len(c.window_pattern) if c.window else 1
        n_scanned = c.n_layer // period * period

        def some_layers(x_BTD: jax.Array, xs: tuple[Params, jax.Array], n: int) -> tuple[jax.Array, None]:
            stacked, first = xs
            for i, params in enumerate(unstack(stacked, n)):
                x_BTD = layer(store(params), x_BTD, first + i, c.sliding[i])  # It is kept for the backward pass so.
            return x_BTD, None

        periods = jax.tree.map(lambda x: x[:n_scanned].reshape(-1, period, *x.shape[1:]), layers)
        x_BTD, _ = jax.lax.scan(
            functools.partial(some_layers, n=period), x_BTD, (periods, jnp.arange(0, n_scanned, period))
        )
        if n_scanned < c.n_layer:
            rest = jax.tree.map(lambda x: x[n_scanned:], layers)
            x_BTD, _ = some_layers(x_BTD, (rest, jnp.int32(n_scanned)), c.n_layer - n_scanned)
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


def head_VD(params: Params) -> Any:
    """The matrix whose products with the hidden states are the logits: the token embeddings, where the head is tied."""
    name = "head_VD" if "head_VD" in params else "tokens_VD"
    return gather({name: params[name]}, params[name].dtype)[name]


def logits_NV(model: GPT, params: Params, hidden_ND: jax.Array) -> jax.Array:
    """The logits of hidden states, float32; -inf for the padding of the vocabulary."""
    head = head_VD(params).astype(hidden_ND.dtype)
    return hide_padding(decoding_product(hidden_ND, head, jnp.float32), model.config.vocab_size)


def rematerialised(layer: Any, policy: RematName) -> Any:
    """`layer` with its activations kept for the backward pass, or computed again, as the policy's name says."""
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_saveable,
        "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if policy == "none" and not gathers_again():
        return layer
    return jax.checkpoint(layer, policy=policies.get(policy, keep_all_but_gathered), static_argnums=3)


def unstack(layers: Any, n_layer: int) -> tuple[Params, ...]:
    """The parameters of each layer; those of a model that is unstacked already, as they are.

    `split` and not indexing: its transpose is one concatenation, where that of L slices is a sum of L padded arrays.
    """
    if isinstance(layers, tuple):
        return layers
    leaves, tree = jax.tree.flatten(layers)
    split = [[part[0] for part in jax.lax.split(leaf, (1,) * n_layer)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, leaves_of_layer) for leaves_of_layer in zip(*split, strict=True))
