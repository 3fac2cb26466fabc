"""Causal self-attention: one function, several backends. `backend.resolve` chooses one, once and never silently.

xla           the formula as it stands: the reference, runs everywhere, O(T^2) memory
block_causal  queries in blocks, each of which reads only the keys up to its end: half the work, the fastest on CPU
cudnn         cuDNN's fused kernel, on NVIDIA GPUs
splash        the Splash Pallas kernel, on TPUs

A row may hold several packed documents; then a query sees only the keys of its own segment. The kernels compute the
scores of other segments, too, and mask them. Without segments, there is no such mask.

Where a mesh divides sequences, each device attends from its part of the queries to all keys. cuDNN's kernel cannot, and
block_causal computes and masks the future, as xla does, because the future keys differ from device to device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.config import ModelConfig
from gpt_jax.model.attention import causal_mask, causal_mask_from, masked_attention, within_segments
from gpt_jax.model.layers import fold_in
from gpt_jax.model.sharding import constrain, context_parts, mesh_is_set, on_each_device

QUERY_BLOCK = 128
"""Queries in a block of block_causal; half as many for whole sequences of up to 512 tokens."""

SPLASH_BLOCKS = (512, 256, 128)
"""Block sizes of the Splash kernel, fastest first; all are whole TPU lanes."""


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    config: ModelConfig,
    window: int = 0,
    keys_B: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Attention of each token to itself and those before it, (B, T, H, K), by the backend `config.attention`.

    With a window, a token sees that many tokens, itself included. With segments, int32 ids, it sees only its own
    segment. Query head h reads key/value head h // (H / G).
    """
    if config.attention == "xla":
        if context_parts() > 1:
            k_BTGK, v_BTGK = constrain(k_BTGK, "BSGK"), constrain(v_BTGK, "BSGK")
        return causal_by_mask(q_BTHK, k_BTGK, v_BTGK, window, config.dropout, keys_B, segments_BT)
    if config.attention == "block_causal" and context_parts() > 1:
        attend = functools.partial(causal_by_blocks_of_a_part, window=window)
        return on_each_device(attend)(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    if config.attention == "block_causal":
        return causal_by_blocks(q_BTHK, k_BTGK, v_BTGK, window, config.dropout, keys_B, segments_BT)
    if config.attention == "cudnn":
        return on_each_device(functools.partial(causal_by_cudnn, window=window))(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    if config.attention == "splash":
        return causal_by_splash(q_BTHK, k_BTGK, v_BTGK, window, segments_BT)
    raise ValueError(f"attention backend {config.attention} was not resolved")


def causal_by_mask(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    window: int,
    dropout_rate: float,
    keys_B: jax.Array | None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """The reference: computes all scores, and masks those of the future."""
    T = q_BTHK.shape[1]
    # Every device holds a constant whole. Divided sequences are long, so their mask has to be divided, too.
    causal_BTS = causal_mask(0, T, 0, T, window) if context_parts() == 1 else causal_mask_from(0, T, T, window)
    mask_BTS = within_segments(causal_BTS, segments_BT, segments_BT)
    return masked_attention(q_BTHK, k_BTGK, v_BTGK, mask_BTS, dropout_rate, keys_B)


def causal_by_blocks(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    window: int,
    dropout_rate: float,
    keys_B: jax.Array | None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Queries in blocks. Block i reads the keys from its window's start to its own end, which saves half of the work,
    or more with a window.

    Each block is rematerialised: its scores fit the CPU's cache, and reading them back from memory costs more than
    computing them again (B8 T256 H6 K64, forward and backward: 54 to 22 ms). Layers that gather their parameters again
    for the backward pass are an exception, since jax.checkpoint has no effect inside another one.
    """
    T = q_BTHK.shape[1]
    block = QUERY_BLOCK if T > 512 else QUERY_BLOCK // 2

    @jax.checkpoint
    def attend(q: Any, k: Any, v: Any, mask: Any, keys_B: Any, segments_BT: Any, segments_BS: Any) -> jax.Array:
        return masked_attention(q, k, v, within_segments(mask, segments_BT, segments_BS), dropout_rate, keys_B)

    def segments_of(first: int, stop: int) -> jax.Array | None:
        return None if segments_BT is None else segments_BT[:, first:stop]

    outs = []
    for i, start in enumerate(range(0, T, block)):
        stop = min(start + block, T)
        first = max(0, start - window + 1) if window else 0
        mask_BTS = causal_mask(start, stop, first, stop, window)
        k, v = k_BTGK[:, first:stop], v_BTGK[:, first:stop]
        segments = segments_of(start, stop), segments_of(first, stop)
        outs.append(attend(q_BTHK[:, start:stop], k, v, mask_BTS, fold_in(keys_B, i), *segments))
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def causal_by_blocks_of_a_part(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    window: int,
) -> jax.Array:
    """`causal_by_blocks` for the queries of one device: its part of the mapped axis "context"."""
    B, T, H, K = q_BTHK.shape
    block = min(T, QUERY_BLOCK)
    N = -(-T // block)
    starts_N = jax.lax.axis_index("context") * T + block * jnp.arange(N)

    def in_blocks(x: jax.Array) -> jax.Array:
        """(B, T, ...) to (N, B, T, ...), with the last block padded."""
        x = jnp.pad(x, ((0, 0), (0, N * block - T), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, N, block, *x.shape[2:]).swapaxes(0, 1)

    # In float32, so that the gradients of keys and values are summed over the blocks in float32.
    k_BSGK, v_BSGK = k_BSGK.astype(jnp.float32), v_BSGK.astype(jnp.float32)
    q_NBTHK, segments_NBT = jax.tree.map(in_blocks, (q_BTHK, segments_BT))

    def attend(block: Any) -> jax.Array:
        q_BTHK, start, segments_BT = block
        return attention_of_a_block(q_BTHK, k_BSGK, v_BSGK, start, segments_BT, segments_BS, window)

    out_NBTHK = jax.lax.map(attend, (q_NBTHK, starts_N, segments_NBT))
    return out_NBTHK.swapaxes(0, 1).reshape(B, N * block, H, K)[:, :T]


def attend_from(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    start: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    window: int,
) -> jax.Array:
    """Attention of the queries from position `start` on to all keys of their sequences, in the queries' dtype."""
    causal_BTS = causal_mask_from(start, q_BTHK.shape[1], k_BSGK.shape[1], window)
    mask_BTS = within_segments(causal_BTS, segments_BT, segments_BS)
    return masked_attention(q_BTHK, k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype), mask_BTS)


attention_of_a_block = jax.custom_vjp(attend_from, nondiff_argnums=(6,))
"""`attend_from`, which the backward pass always computes again. jax.checkpoint would have no effect here, inside the
jax.checkpoint of layers that gather their parameters again."""


def _attention_of_a_block_fwd(*args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return attend_from(*args), args[:-1]


def _attention_of_a_block_bwd(window: int, saved: tuple[Any, ...], gradient_BTHK: jax.Array) -> tuple[Any, ...]:
    q_BTHK, k_BSGK, v_BSGK, start, segments_BT, segments_BS = saved

    def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> jax.Array:
        return attend_from(q_BTHK, k_BSGK, v_BSGK, start, segments_BT, segments_BS, window)

    _, backward = jax.vjp(attend, q_BTHK, k_BSGK, v_BSGK)
    return *backward(gradient_BTHK), None, None, None


attention_of_a_block.defvjp(_attention_of_a_block_fwd, _attention_of_a_block_bwd)


def causal_by_cudnn(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    window: int,
) -> jax.Array:
    """cuDNN's kernel, which skips the future and the keys before a window. It adds segments to the scores as a mask,
    (B, 1, T, T) in memory."""
    T, mask_B1TT = q_BTHK.shape[1], None
    if T % 2:  # JAX refuses odd lengths in the backward pass. No query of the sequence sees the added key.

        def pad_to_even(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))

        arrays = q_BTHK, k_BTGK, v_BTGK, segments_BT, segments_BS
        q_BTHK, k_BTGK, v_BTGK, segments_BT, segments_BS = jax.tree.map(pad_to_even, arrays)
    if segments_BT is not None and segments_BS is not None:
        mask_B1TT = (segments_BT[:, :, None] == segments_BS[:, None])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        mask=mask_B1TT,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )[:, :T]


def causal_by_splash(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    window: int,
    segments_BT: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The Splash kernel, which skips masked blocks and never writes scores to memory. `interpret` runs it on CPU.

    Each sequence and key/value head has one kernel call, with the R query heads that share it. The kernel finds the
    blocks to skip in tables; a device with a part of the queries gets the rows of its part.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Slow to import, and for TPUs only.

    T, H = q_BTHK.shape[1:3]
    R = H // k_BTGK.shape[2]
    parts = context_parts()
    block = splash_block(T, parts)
    if not block:  # Resolved for another context_length than these sequences have.
        raise ValueError(f"Splash attends over sequences in steps of {SPLASH_BLOCKS[-1] * parts} tokens, not {T}")
    mask = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
    heads = splash.MultiHeadMask([mask] * R)
    sizes = splash_sizes(block, block)
    kernel = splash.make_splash_mqa(heads, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret)

    def attend(q_BTHK: Any, k_BSGK: Any, v_BSGK: Any, segments_BT: Any, segments_BS: Any, kernel: Any) -> jax.Array:
        B, T, H, K = q_BTHK.shape
        q_BGRTK = (q_BTHK * K**-0.5).reshape(B, T, H // R, R, K).transpose(0, 2, 3, 1, 4)
        segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BS)
        attend_sequence = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out_BGRTK = jax.vmap(attend_sequence)(q_BGRTK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), segments)
        return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)

    if not mesh_is_set():
        return on_each_device(attend)(q_BTHK, k_BTGK, v_BTGK, segments_BT, kernel)
    rows = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, "context"))
    return on_each_device(attend, kernel.manual_sharding_spec(rows))(q_BTHK, k_BTGK, v_BTGK, segments_BT, kernel)


def splash_block(length: int, parts: int = 1) -> int:
    """The largest of SPLASH_BLOCKS that divides each of `parts` equal parts of a length; 0 if none does."""
    return next((block for block in SPLASH_BLOCKS if length % (block * parts) == 0), 0)


def splash_sizes(queries: int, keys: int) -> Any:
    """The sizes of all of Splash's blocks, forward and backward."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
