"""Causal self-attention: one function, several backends. `backend.resolve` chooses one, once and never in silence.

xla           the formula as it stands: the reference, runs everywhere, O(T^2) memory
block_causal  queries in blocks, each looking only at keys up to its end: half the work, and the fastest on CPU
cudnn         cuDNN's fused kernel, on NVIDIA GPUs
splash        the Splash Pallas kernel, on TPUs

Where a mesh divides sequences, each device attends from its part of the queries to all keys. cuDNN's kernel cannot, and
block_causal looks at the future, too, and masks it, as xla does: which keys those are, differs from device to device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.config import ModelConfig
from gpt_jax.model.attention import causal_mask, causal_mask_from, masked_attention
from gpt_jax.model.layers import fold_in
from gpt_jax.model.sharding import constrain, context_parts, mesh_is_set, on_each_device

QUERY_BLOCK = 128
"""Queries that block_causal takes at one time; half as many of whole sequences of up to 512 tokens."""

SPLASH_BLOCKS = (512, 256, 128)
"""Sizes that the Splash kernel may cut the sequence into, fastest first; all are whole TPU lanes."""


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    config: ModelConfig,
    window: int = 0,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """Attention of each token to itself and those before it, (B, T, H, K), by the backend that `config` was given.

    With a window, a token sees that many tokens, itself included. Query head h reads key/value head h // (H / G).
    """
    if config.attention == "xla":
        if context_parts() > 1:
            k_BTGK, v_BTGK = constrain(k_BTGK, "BSGK"), constrain(v_BTGK, "BSGK")
        return causal_by_mask(q_BTHK, k_BTGK, v_BTGK, window, config.dropout, keys_B)
    if config.attention == "block_causal" and context_parts() > 1:
        attend = functools.partial(causal_by_blocks_of_a_part, window=window)
        return on_each_device(attend)(q_BTHK, k_BTGK, v_BTGK)
    if config.attention == "block_causal":
        return causal_by_blocks(q_BTHK, k_BTGK, v_BTGK, window, config.dropout, keys_B)
    if config.attention == "cudnn":
        fused = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )
        return on_each_device(fused)(q_BTHK, k_BTGK, v_BTGK)
    if config.attention == "splash":
        return causal_by_splash(q_BTHK, k_BTGK, v_BTGK, window)
    raise ValueError(f"attention backend {config.attention} was not resolved")


def causal_by_mask(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    window: int,
    dropout_rate: float,
    keys_B: jax.Array | None,
) -> jax.Array:
    """The reference: all scores, those of the future masked."""
    T = q_BTHK.shape[1]
    # A constant is whole on every device; where sequences are long enough to be divided, so is the mask.
    mask_BTS = causal_mask(0, T, 0, T, window) if context_parts() == 1 else causal_mask_from(0, T, T, window)
    return masked_attention(q_BTHK, k_BTGK, v_BTGK, mask_BTS, dropout_rate, keys_B)


def causal_by_blocks(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    window: int,
    dropout_rate: float,
    keys_B: jax.Array | None,
) -> jax.Array:
    """Queries in blocks; block i looks at keys from its window's start to its own end, so half of the work or more is
    never done.

    Each block is rematerialised: its scores fit the CPU's cache, and reading them back from memory costs more than
    computing them again (B8 T256 H6 K64, forward and backward: 54 to 22 ms). Not where layers gather their parameters
    again for the backward pass: jax.checkpoint has no say within another one.
    """
    T = q_BTHK.shape[1]
    block = QUERY_BLOCK if T > 512 else QUERY_BLOCK // 2
    attend = jax.checkpoint(functools.partial(masked_attention, dropout_rate=dropout_rate))
    outs = []
    for i, start in enumerate(range(0, T, block)):
        stop = min(start + block, T)
        first = max(0, start - window + 1) if window else 0
        mask_BTS = causal_mask(start, stop, first, stop, window)
        k, v = k_BTGK[:, first:stop], v_BTGK[:, first:stop]
        outs.append(attend(q_BTHK[:, start:stop], k, v, mask_BTS, keys_B=fold_in(keys_B, i)))
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def causal_by_blocks_of_a_part(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, window: int) -> jax.Array:
    """The same for the part of the queries that this device of the mapped axis "context" has."""
    B, T, H, K = q_BTHK.shape
    block = min(T, QUERY_BLOCK)
    N = -(-T // block)
    starts_N = jax.lax.axis_index("context") * T + block * jnp.arange(N)
    q_BTHK = jnp.pad(q_BTHK, ((0, 0), (0, N * block - T), (0, 0), (0, 0)))
    q_NBTHK = q_BTHK.reshape(B, N, block, H, K).swapaxes(0, 1)
    # In float32, for the gradients of keys and values, which are added up over the blocks.
    k_BSGK, v_BSGK = k_BSGK.astype(jnp.float32), v_BSGK.astype(jnp.float32)
    out_NBTHK = jax.lax.map(lambda xs: attention_of_a_block(xs[0], k_BSGK, v_BSGK, xs[1], window), (q_NBTHK, starts_N))
    return out_NBTHK.swapaxes(0, 1).reshape(B, N * block, H, K)[:, :T]


def attend_from(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, start: jax.Array, window: int) -> jax.Array:
    """Attention of the queries from position `start` on, to all keys of their sequences, in the queries' dtype."""
    mask_BTS = causal_mask_from(start, q_BTHK.shape[1], k_BSGK.shape[1], window)
    return masked_attention(q_BTHK, k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype), mask_BTS)


attention_of_a_block = jax.custom_vjp(attend_from, nondiff_argnums=(4,))
"""`attend_from`, which the backward pass computes again, whatever else it keeps: jax.checkpoint has no say within
another one, as layers are in where parameters are gathered again."""


def _attention_of_a_block_fwd(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, start: jax.Array, window: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return attend_from(q_BTHK, k_BSGK, v_BSGK, start, window), (q_BTHK, k_BSGK, v_BSGK, start)


def _attention_of_a_block_bwd(window: int, saved: tuple[jax.Array, ...], gradient_BTHK: jax.Array) -> Any:
    q_BTHK, k_BSGK, v_BSGK, start = saved
    _, backward = jax.vjp(lambda q, k, v: attend_from(q, k, v, start, window), q_BTHK, k_BSGK, v_BSGK)
    return *backward(gradient_BTHK), None


attention_of_a_block.defvjp(_attention_of_a_block_fwd, _attention_of_a_block_bwd)


def causal_by_splash(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, window: int, interpret: bool = False
) -> jax.Array:
    """The Splash kernel, which skips masked blocks and never writes scores to memory. `interpret` runs it on CPU.

    One kernel call for each sequence and key/value head, with the R query heads that share it. What it skips is in
    tables of its blocks, of which each device that has a part of the queries is given its rows.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Slow to import, and for TPUs only.

    T, H = q_BTHK.shape[1:3]
    R = H // k_BTGK.shape[2]
    parts = context_parts()
    block = next(b for b in SPLASH_BLOCKS if T // parts % b == 0)
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
    mask = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
    heads = splash.MultiHeadMask([mask] * R)
    kernel = splash.make_splash_mqa(heads, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret)

    def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, kernel: Any) -> jax.Array:
        B, T, H, K = q_BTHK.shape
        q_BGRTK = (q_BTHK * K**-0.5).reshape(B, T, H // R, R, K).transpose(0, 2, 3, 1, 4)
        out_BGRTK = jax.vmap(jax.vmap(kernel))(q_BGRTK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2))
        return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)

    if not mesh_is_set():
        return attend(q_BTHK, k_BTGK, v_BTGK, kernel)
    rows = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, "context"))
    return on_each_device(attend, kernel.manual_sharding_spec(rows))(q_BTHK, k_BTGK, v_BTGK, kernel)
