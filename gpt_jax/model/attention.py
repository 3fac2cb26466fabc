"""Causal self-attention: one function, several backends. `backend.resolve` chooses one, once and never in silence.

xla           the formula as it stands: the reference, runs everywhere, O(T^2) memory
block_causal  queries in blocks, each looking only at keys up to its end: half the work, and the fastest on CPU
cudnn         cuDNN's fused kernel, on NVIDIA GPUs
splash        the Splash Pallas kernel, on TPUs
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.model.layers import dropout, fold_in

SPLASH_BLOCKS = (512, 256, 128)
"""Sizes that the Splash kernel may cut the sequence into, fastest first; all are whole TPU lanes."""


def masked_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | np.ndarray,
    dropout_rate: float = 0.0,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys where `mask` is true (Vaswani et al. 2017), to (B, T, H, K).

    Scores and softmax are float32. The mask is boolean, broadcast over B; every query needs one key or more. Query
    head h reads key/value head h // (H / G).
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * (1 / np.sqrt(K)).astype(q_BTHK.dtype)
    scores_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1)
    weights_BGRTS = dropout(weights_BGRTS, dropout_rate, keys_B)
    out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS.astype(v_BSGK.dtype), v_BSGK)
    return out_BTGRK.reshape(B, T, H, K)


def causal_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, config: ModelConfig, keys_B: jax.Array | None = None
) -> jax.Array:
    """Attention of each token to itself and those before it, (B, T, H, K), by the backend that `config` was given."""
    if config.attention == "xla":
        return causal_by_mask(q_BTHK, k_BTGK, v_BTGK, config.dropout, keys_B)
    if config.attention == "block_causal":
        return causal_by_blocks(q_BTHK, k_BTGK, v_BTGK, config.dropout, keys_B)
    if config.attention == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn")
    if config.attention == "splash":
        return causal_by_splash(q_BTHK, k_BTGK, v_BTGK)
    raise ValueError(f"attention backend {config.attention} was not resolved")


def causal_by_mask(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, dropout_rate: float, keys_B: jax.Array | None
) -> jax.Array:
    """The reference: all scores, those of the future masked."""
    T = q_BTHK.shape[1]
    return masked_attention(q_BTHK, k_BTGK, v_BTGK, np.tril(np.ones((1, T, T), bool)), dropout_rate, keys_B)


def causal_by_blocks(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, dropout_rate: float, keys_B: jax.Array | None
) -> jax.Array:
    """Queries in blocks; block i looks at keys up to its own end and no further, so half of the work is never done.

    Each block is rematerialised: its scores fit the CPU's cache, and reading them back from memory costs more than
    computing them again (B8 T256 H6 K64, forward and backward: 54 to 22 ms).
    """
    T = q_BTHK.shape[1]
    block = 64 if T <= 512 else 128
    attend = jax.checkpoint(functools.partial(masked_attention, dropout_rate=dropout_rate))
    outs = []
    for i, start in enumerate(range(0, T, block)):
        stop = min(start + block, T)
        mask_BTS = np.tril(np.ones((1, stop - start, stop), bool), k=start)
        outs.append(
            attend(q_BTHK[:, start:stop], k_BTGK[:, :stop], v_BTGK[:, :stop], mask_BTS, keys_B=fold_in(keys_B, i))
        )
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def causal_by_splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, interpret: bool = False) -> jax.Array:
    """The Splash kernel, which skips masked blocks and never writes scores to memory. `interpret` runs it on CPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Slow to import, and for TPUs only.

    T, H, K = q_BTHK.shape[1:]
    block = next(b for b in SPLASH_BLOCKS if T % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    q_BHTK, k_BGTK, v_BGTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return jax.vmap(kernel)(q_BHTK * K**-0.5, k_BGTK, v_BGTK).swapaxes(1, 2)
