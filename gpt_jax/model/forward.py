"""The GPT as pure functions: its initial parameters, and the hidden states of tokens under given parameters."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from gpt_jax.model import cache as kv
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.lora import for_rows


def init_params(model: GPT, key: jax.Array) -> Params:
    """The initial parameters, float32, with the layers stacked. The configuration need not be resolved, since they do
    not depend on how the model is computed."""
    # One token is enough to find all shapes, but too few for the fused attentions, which work on whole blocks.
    plain = GPT(dataclasses.replace(model.config, attention="xla", dtype="float32"))
    return cast(Params, plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def forward(
    model: GPT,
    params: Params,
    tokens_BT: jax.Array,
    keys_B: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """The hidden states (B, T, D) of whole sequences, after the final norm. keys_B: dropout keys; None: no dropout.

    segments_BT, positions_BT: segments and positions of documents that are packed into a row, see `Batch`.
    """
    args = {"params": params}, tokens_BT, keys_B, segments_BT, positions_BT
    return cast(tuple[jax.Array, None], model.apply(*args))[0]


def forward_cached(
    model: GPT, params: Params, tokens_BT: jax.Array, cache: kv.Cache, start_B: jax.Array
) -> tuple[jax.Array, kv.Cache]:
    """The hidden states (B, T, D) of tokens at positions from start_B on, and the cache with these tokens added.

    With T = 1 each row has a position of its own; with more, the rows all begin at start_B[0]. `scales_BR` in the
    parameters, if it is there, has the scales of each row's adapter, see `lora.Adapters`.
    """
    if "scales_BR" in params:
        params = params | {"layers": tuple(for_rows(layer, params["scales_BR"]) for layer in params["layers"])}
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
    args = {"params": params}, tokens_BT, None, None, positions_BT, cache
    return cast(tuple[jax.Array, kv.Cache], model.apply(*args))
