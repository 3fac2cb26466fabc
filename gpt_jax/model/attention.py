"""The formula of attention under a mask, and the masks."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model.layers import dropout


def masked_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | np.ndarray,
    dropout_rate: float = 0.0,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys where `mask` is true (Vaswani et al. 2017): (B, T, H, K).

    Scores and softmax are float32. The boolean mask broadcasts over B, and shows each query at least one key. Query
    head h reads key/value head h // (H / G).
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * (1 / np.sqrt(K)).astype(q_BTHK.dtype)
    scores_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    weights_BGRTS = dropout(masked_softmax(scores_BGRTS, mask_BTS[:, None, None]), dropout_rate, keys_B)
    out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS.astype(v_BSGK.dtype), v_BSGK)
    return out_BTGRK.reshape(B, T, H, K)


def masked_softmax(scores: jax.Array, mask: jax.Array | np.ndarray) -> jax.Array:
    """softmax over the last axis, with the lowest float32 in place of the scores where `mask` is false."""
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


Distance = TypeVar("Distance", jax.Array, np.ndarray)


def visible(distance: Distance, window: int) -> Distance:
    """True where a query sees the key `distance` tokens before it, bool in the shape of `distance`. A negative distance
    is in the future; with a window (0: none), keys at a distance of `window` or more are hidden, too."""
    return (distance >= 0) & (distance < window) if window else distance >= 0


def within_segments(
    mask_BTS: jax.Array | np.ndarray, segments_BT: jax.Array | None, segments_BS: jax.Array | None
) -> jax.Array | np.ndarray:
    """The mask, false also where key and query are of different segments; without segments, the mask as it is."""
    if segments_BT is None or segments_BS is None:
        return mask_BTS
    return mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None])


def causal_mask(start: int, stop: int, first_key: int, last_key: int, window: int) -> np.ndarray:
    """The mask of queries [start, stop) over keys [first_key, last_key): bool (1, T, S), a constant."""
    return visible(np.arange(start, stop)[:, None] - np.arange(first_key, last_key), window)[None]


def causal_mask_from(start: int | jax.Array, T: int, S: int, window: int) -> jax.Array:
    """The mask of T queries from `start` on over all S keys: bool (1, T, S), computed by the program that uses it."""
    return visible(start + jnp.arange(T)[:, None] - jnp.arange(S), window)[None]
