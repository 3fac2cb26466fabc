"""The GPT as linen modules. GPT-2 and the Llama family share one architecture, with different values in `ModelConfig`.

The parameter tree, with the L layers stacked on a leading axis; the parts in brackets depend on the configuration:

    tokens_VD, [positions_TD], [head_VD]
    layers: norm_1, attention: {qkv, out, [q_norm, k_norm]}, [post_norm_1],
            norm_2, mlp: {[gate], up, down}, [post_norm_2]
    final_norm
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.model import cache as kv
from gpt_jax.model import stack
from gpt_jax.model.cached import cached_attention
from gpt_jax.model.kernels import causal_attention
from gpt_jax.model.layers import ACTIVATIONS, INIT_STD, RMSNorm, dropout, fold_in, norm
from gpt_jax.model.lora import linear
from gpt_jax.model.rope import rotate
from gpt_jax.model.sharding import constrain, for_use, row_major

Params = dict[str, Any]


class Attention(nn.Module):
    """Causal self-attention over its input or, when there is a cache, over the cache and its input.

    The columns of the qkv kernel are grouped by key/value head: each of the G groups has its R query heads, then its
    key head, then its value head. One matrix product computes all three, and any split of the columns into whole
    groups is a split of the heads.
    """

    config: ModelConfig
    sliding: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        keys_B: jax.Array | None,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array | None,
        cache: kv.Parts | None,
    ) -> tuple[jax.Array, kv.Parts | None]:
        c = self.config
        B, T, D = x_BTD.shape
        H, G, K = c.n_head, c.kv_heads, c.head_dim
        R = H // G
        window = c.window if self.sliding else 0

        qkv = linear(c, "qkv", G * (R + 2) * K)(x_BTD, keys_B).reshape(B, T, G, R + 2, K)
        qkv = constrain(qkv, "BTGRK")
        q_BTHK = qkv[:, :, :, :R].reshape(B, T, H, K)
        k_BTGK, v_BTGK = qkv[:, :, :, R], qkv[:, :, :, R + 1]
        if c.qk_norm:
            q_BTHK = RMSNorm(c.norm_eps, c.dtype, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(c.norm_eps, c.dtype, name="k_norm")(k_BTGK)
        if c.positions == "rotary":
            rotary_positions_BT = jnp.arange(T)[None] if positions_BT is None else positions_BT
            q_BTHK = rotate(q_BTHK, rotary_positions_BT, c, self.sliding)
            k_BTGK = rotate(k_BTGK, rotary_positions_BT, c, self.sliding)
        if c.query_scale:  # Replaces 1 / sqrt(K), by which every attention multiplies.
            q_BTHK = q_BTHK * (c.query_scale * np.sqrt(K)).astype(q_BTHK.dtype)

        if cache is None:
            out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, c, window, fold_in(keys_B, 0), segments_BT)
        else:
            assert positions_BT is not None
            out_BTHK, cache = cached_attention(q_BTHK, k_BTGK, v_BTGK, cache, positions_BT[:, 0], c, window)

        out_BTD = linear(c, "out", D, residual=True)(out_BTHK.reshape(B, T, H * K), keys_B)
        return dropout(out_BTD, c.dropout, fold_in(keys_B, 1)), cache


class MLP(nn.Module):
    """The feed-forward layer: D to F, an activation, F to D. When gated, activation(gate) * up (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        x_BTF = linear(c, "up", c.ff_dim)(x_BTD, keys_B)
        if c.gated:
            x_BTF = activation(linear(c, "gate", c.ff_dim)(x_BTD, keys_B)) * x_BTF
        else:
            x_BTF = activation(x_BTF)
        x_BTF = constrain(x_BTF, "BTF")
        out_BTD = linear(c, "down", c.d_model, residual=True)(x_BTF, keys_B)
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
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        cache: kv.Parts | None = None,
    ) -> tuple[jax.Array, kv.Parts | None]:
        c = self.config
        attention, mlp = Attention(c, self.sliding, name="attention"), MLP(c, name="mlp")
        out_BTD, cache = attention(norm(c, "norm_1")(x_BTD), keys_B, segments_BT, positions_BT, cache)
        x_BTD = x_BTD + (norm(c, "post_norm_1")(out_BTD) if c.post_norm else out_BTD)
        out_BTD = mlp(norm(c, "norm_2")(x_BTD), keys_B)
        x_BTD = x_BTD + (norm(c, "post_norm_2")(out_BTD) if c.post_norm else out_BTD)
        return constrain(x_BTD, "BTD"), cache


class GPT(nn.Module):
    """Maps token ids to hidden states. `config` is resolved: its vocabulary, dtype and attention are not "auto"."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        keys_B: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        cache: kv.Cache | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """The hidden states (B, T, D) after the final norm, and the cache with these tokens in it.

        tokens_BT: int ids. keys_B: one dropout key per sequence; None: no dropout. segments_BT: int32; a token attends
        only to its own segment; None: each row is one. positions_BT: int32; None: each row counts from 0. cache: the
        tokens stand at consecutive positions, and also attend to the cached tokens before them: one token of each row,
        at any position, or several that begin at the same position in all rows.
        """
        c = self.config
        normal = nn.initializers.normal(INIT_STD)
        tokens_VD = self.param("tokens_VD", normal, (c.embedding_rows, c.d_model))
        if not c.tied_head:
            self.param("head_VD", normal, (c.embedding_rows, c.d_model))
        x_BTD = for_use({"tokens_VD": tokens_VD}, tokens_VD.dtype)["tokens_VD"][tokens_BT]
        if self.has_variable("params", "tokens_scale_V"):
            x_BTD = x_BTD * self.get_variable("params", "tokens_scale_V")[tokens_BT][..., None]
        if c.positions == "learned":
            positions_TD = self.param("positions_TD", normal, (c.context_length, c.d_model))
            positions_TD = for_use({"positions_TD": positions_TD}, positions_TD.dtype)["positions_TD"]
            T = tokens_BT.shape[1]
            x_BTD = x_BTD + (positions_TD[:T] if positions_BT is None else positions_TD[positions_BT])
            if cache is None:  # With one, there are no gradients.
                x_BTD = row_major(x_BTD, "BTD")
        x_BTD = x_BTD.astype(c.dtype)
        if c.scale_embeddings:
            x_BTD = x_BTD * np.sqrt(c.d_model).astype(x_BTD.dtype)
        x_BTD = constrain(dropout(x_BTD, c.dropout, fold_in(keys_B, 0)), "BTD")
        x_BTD, cache = self.run_layers(x_BTD, fold_in(keys_B, 1), segments_BT, positions_BT, cache)
        return norm(c, "final_norm")(x_BTD), cache

    def run_layers(
        self,
        x_BTD: jax.Array,
        keys_B: jax.Array | None,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array | None,
        cache: kv.Cache | None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """The output of all blocks, run by model/stack.py, and the updated cache, if there is one."""
        c = self.config
        blocks = {sliding: Block(c, sliding, parent=None) for sliding in (False, True)}

        def init_layers(key: jax.Array) -> Params:
            return jax.vmap(lambda key: blocks[False].init(key, x_BTD)["params"])(jax.random.split(key, c.n_layer))

        def block(params: Params, x_BTD: jax.Array, i: int | jax.Array, sliding: bool) -> jax.Array:
            layer_keys_B = fold_in(keys_B, i)
            args = {"params": params}, x_BTD, layer_keys_B, segments_BT, positions_BT
            return cast(Any, blocks[sliding].apply(*args))[0]

        def cached_block(params: Params, x_BTD: jax.Array, sliding: bool, layer_cache: kv.Parts) -> Any:
            return blocks[sliding].apply({"params": params}, x_BTD, None, None, positions_BT, layer_cache)

        if self.is_initializing():
            layers = self.param("layers", init_layers)
        else:
            layers = self.get_variable("params", "layers")
        if cache is not None:
            return stack.run_cached(cached_block, layers, x_BTD, cache, c)
        return stack.run(block, layers, x_BTD, c), None
