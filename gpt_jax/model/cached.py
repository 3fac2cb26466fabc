"""Attention over the KV cache: of the newest token of each row, and of a chunk of a prompt.

A chunk attends to itself, and to the cache before it, through the backend that `config.attention` names. No backend
writes scores of more than a chunk of queries and the places of one cache to memory, whatever the length of the prompt.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gpt_jax.config import ModelConfig
from gpt_jax.model.attention import causal_mask, visible
from gpt_jax.model.cache import LayerCache, Parts, starts, update
from gpt_jax.model.kernels import splash_block, splash_sizes
from gpt_jax.model.sharding import BATCH_AXES, in_parts
from gpt_jax.model.weight import int8_einsum

KEY_BLOCK, MANY_KEYS = 128, 512
"""Places of the cache that `chunk_by_blocks` reads at one time, the more where all of them stand before the chunk; a
cache that is longer has a multiple of the fewer."""

IN_TURN = 128
"""The least places of a part of the cache that CPUs read for those rows alone that have come to it."""

MOST_SUMMED = 1024
"""The most products of 15 and 8 bits, in a power of two, whose sum is an int32 in any case."""

LOWEST = np.finfo(np.float32).min


class Sums(NamedTuple):
    """What the softmax of some keys comes to, as others are added: all float32."""

    most_XR: jax.Array  # The largest score.
    sum_XR: jax.Array  # The sum of the weights, exp(score - most).
    out_XRK: jax.Array  # The sum of the values, times their weights.


def cached_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    parts: Parts,
    start_B: jax.Array,
    config: ModelConfig,
    window: int = 0,
) -> tuple[jax.Array, Parts]:
    """Attention of T new tokens, at positions from start_B (int32) on, to themselves and to those before: (B, T, H, K);
    and the cache with their keys and values.

    T = 1: every row has a position of its own. T > 1: all rows begin at start_B[0], and the cache has one part. With a
    window, a token sees that many tokens, itself included.

    On a mesh, each device has the cache of its heads, all of which it reads and writes by itself; with T = 1, of its
    rows only. What is read by T > 1, the prompts, is whole in each part of the batch.
    """

    def on_one_device(
        q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, parts: Parts, start_B: jax.Array
    ) -> tuple[jax.Array, Parts]:
        k_BTGK, v_BTGK = with_finite_values(k_BTGK, v_BTGK)
        parts = update(parts, k_BTGK, v_BTGK, start_B)
        if q_BTHK.shape[1] == 1:
            return newest_attention(q_BTHK, parts, start_B, window), parts
        [cache] = parts
        if config.attention == "cudnn":
            return chunk_by_cudnn(q_BTHK, cache, start_B[0], window), parts
        if config.attention == "splash":
            return chunk_by_splash(q_BTHK, cache, start_B[0], window), parts
        return chunk_by_blocks(q_BTHK, k_BTGK, v_BTGK, cache, start_B[0], window), parts

    rows = BATCH_AXES if q_BTHK.shape[1] == 1 else ()
    heads, cached = PartitionSpec(rows, None, "tensor"), PartitionSpec((*rows, "tensor"))
    attend = in_parts(on_one_device, (heads, heads, heads, cached, PartitionSpec(rows)), (heads, cached))
    return cast(tuple[jax.Array, Parts], attend(q_BTHK, k_BTGK, v_BTGK, parts, start_B))


def with_finite_values(k_BTGK: jax.Array, v_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys, NaN where a value is not finite, and the values, 0 there: (B, T, G, K) both.

    A place of the cache may hold what another sequence left there. Its score is masked, but its value counts zero
    times, which is NaN for what is not finite. Its own sequence finds the NaN in its scores.
    """
    finite_BTGK = jnp.isfinite(v_BTGK)
    return jnp.where(finite_BTGK, k_BTGK, jnp.nan), jnp.where(finite_BTGK, v_BTGK, 0)


def newest_attention(q_B1HK: jax.Array, parts: Parts, position_B: jax.Array, window: int) -> jax.Array:
    """Attention of each row's newest token to its places up to position_B: (B, 1, H, K).

    A part of the cache is read if a row has come to it, and on a CPU, if it is large, for no other rows. Of each part
    there are the largest score, the sum of the weights and that of the weighted values, as in `chunk_by_blocks`. Where
    a row sees nothing of a part, they are the same as if it was not read, so that a row does not depend on the others.
    """
    B, _, H, K = q_B1HK.shape
    X = parts[0].k_XSK.shape[0]
    R = H * B // X
    q_XRK = heads_of(q_B1HK, X)

    def read(q_XRK: jax.Array, position_B: jax.Array, part: LayerCache, first: int) -> Sums:
        distance_BS = position_B[:, None] - first - jnp.arange(part.k_XSK.shape[1])
        mask_X1S = jnp.repeat(visible(distance_BS, window), X // B, axis=0)[:, None]
        scores_XRS = jnp.where(mask_X1S, scores(q_XRK, part), LOWEST)
        most_XR = jnp.max(scores_XRS, axis=-1)
        weights_XRS = jnp.where(mask_X1S, jnp.exp(scores_XRS - most_XR[..., None]), 0)
        return Sums(most_XR, jnp.sum(weights_XRS, axis=-1), weighted(weights_XRS, part, q_XRK.dtype))

    def read_in_turn(q_XRK: jax.Array, position_B: jax.Array, part: LayerCache, first: int) -> Sums:
        """The rows that have come to the part, one after the other: a little slower than all at once, if all have."""
        has_come_B = position_B >= first
        order_B = jnp.argsort(~has_come_B)

        def add(i: jax.Array, sums: Sums) -> Sums:
            own = order_B[i]

            def of_row(x_X: jax.Array) -> jax.Array:
                """In one dimension, since XLA:CPU copies int8 byte by byte where there are more: 23 to 5 microseconds
                for 256 places of three heads."""
                size = x_X.size // B
                return jax.lax.dynamic_slice_in_dim(x_X.reshape(-1), own * size, size).reshape(-1, *x_X.shape[1:])

            def with_row(x_X: jax.Array, row_G: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x_X, row_G, own * len(row_G), axis=0)

            q_GRK, position_1, part_of_row = jax.tree.map(of_row, (q_XRK, position_B, part))
            return jax.tree.map(with_row, sums, read(q_GRK, position_1, part_of_row, first))

        return jax.lax.fori_loop(0, jnp.sum(has_come_B), add, nothing())

    def read_from(number: int, parts: Parts) -> Sums:
        """All parts from that one on; `parts` are all, since the branches of a condition take arrays as arguments."""
        first, part = firsts[number], parts[number]
        on_cpu = read_in_turn if B > 1 and part.k_XSK.shape[1] >= IN_TURN else read
        ways = {name: functools.partial(how, first=first) for name, how in (("cpu", on_cpu), ("default", read))}
        sums = jax.lax.platform_dependent(q_XRK, position_B, part, **ways)
        if number + 1 == len(parts):
            return sums
        goes_on = jnp.any(position_B >= firsts[number + 1])
        rest = jax.lax.cond(goes_on, functools.partial(read_from, number + 1), nothing, parts)
        most_XR = jnp.maximum(sums.most_XR, rest.most_XR)
        scales = [jnp.exp(each.most_XR - most_XR) for each in (sums, rest)]
        return Sums(
            most_XR,
            sums.sum_XR * scales[0] + rest.sum_XR * scales[1],
            sums.out_XRK * scales[0][..., None] + rest.out_XRK * scales[1][..., None],
        )

    def nothing(*_: Parts) -> Sums:
        return Sums(jnp.full((X, R), LOWEST), jnp.zeros((X, R)), jnp.zeros((X, R, K)))

    firsts = starts(parts)
    sums = read_from(0, parts)
    return (sums.out_XRK / sums.sum_XR[..., None]).astype(q_B1HK.dtype).reshape(B, 1, H, K)


def scores(q_XRK: jax.Array, part: LayerCache) -> jax.Array:
    """Queries times keys, float32 (X, R, S)."""
    if part.k_scale_XS1 is None:
        return jax.lax.platform_dependent(q_XRK, part.k_XSK, cpu=scores_exchanged, default=scores_as_they_stand)
    scores_XRS = int8_products("XRK,XSK->XRS", q_XRK, part.k_XSK, q_XRK.dtype)
    return scores_XRS * part.k_scale_XS1.swapaxes(1, 2)


def weighted(weights_XRS: jax.Array, part: LayerCache, dtype: DTypeLike) -> jax.Array:
    """The sum of the values times their weights, float32 (X, R, K), multiplied in the dtype of the values, or in
    `dtype`, if they are in int8."""
    if part.v_scale_XS1 is None:
        weights_XRS = weights_XRS.astype(part.v_XSK.dtype)
        return jnp.einsum("XRS,XSK->XRK", weights_XRS, part.v_XSK, preferred_element_type=jnp.float32)
    # With a barrier, since XLA:CPU would compute the weights anew for each way in which they are used.
    weights_XRS = jax.lax.optimization_barrier(weights_XRS * part.v_scale_XS1.swapaxes(1, 2))
    return int8_products("XRS,XSK->XRK", weights_XRS, part.v_XSK, dtype, cpu=weighted_by_integers)


def weighted_by_integers(weights_XRS: jax.Array, v_XSK: jax.Array) -> jax.Array:
    """The sum of the values, int8, times their weights, float32 (X, R, K), in sums of so few places that there is room
    for 15 bits of the weights, of which many small ones may matter beside a large one."""
    X, R, S = weights_XRS.shape
    C = S if S <= MOST_SUMMED else math.gcd(S, MOST_SUMMED)
    weights_YRC = weights_XRS.reshape(X, R, S // C, C).swapaxes(1, 2).reshape(-1, R, C)
    out_YRK = int8_einsum("YRC,YCK->YRK", weights_YRC, v_XSK.reshape(-1, C, v_XSK.shape[2]))
    return jnp.sum(out_YRK.reshape(X, S // C, R, -1), axis=1)


def int8_products(
    spec: str,
    x: jax.Array,
    y: jax.Array,
    dtype: DTypeLike,
    cpu: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The einsum of x with y, which is int8, float32. As in `weight.int8_product`, accelerators multiply in `dtype`,
    and CPUs integers, by `cpu` or by `weight.int8_einsum`."""

    def as_it_stands(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, cpu=cpu or functools.partial(int8_einsum, spec), default=as_it_stands)


def scores_as_they_stand(q_XRK: jax.Array, k_XSK: jax.Array) -> jax.Array:
    """q @ k.T, in float32."""
    return jnp.einsum("XRK,XSK->XRS", q_XRK, k_XSK, preferred_element_type=jnp.float32)


def scores_exchanged(q_XRK: jax.Array, k_XSK: jax.Array) -> jax.Array:
    """(k @ q.T).T. As in `weight.decoding_product`, XLA:CPU reads the left operand in place, and copies the right one
    first: 186 to 90 microseconds for 24 heads of 3 queries each, and 256 places."""
    scores_XSR = jnp.einsum("XSK,XRK->XSR", k_XSK, q_XRK, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(scores_XSR).swapaxes(1, 2)


def chunk_by_blocks(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, cache: LayerCache, start: jax.Array, window: int
) -> jax.Array:
    """Attention within the chunk, then to the cache before it, a block of places after the other, as far as there are
    tokens: a softmax whose maximum and sum are carried on (Milakov and Gimelshein 2018)."""
    B, T, H, K = q_BTHK.shape
    X, S, _ = cache.k_XSK.shape
    R = H * B // X
    few, many = min(S, KEY_BLOCK), min(S, MANY_KEYS)
    q_XNK = heads_of(q_BTHK, X)
    k_XTK, v_XTK = (x.swapaxes(1, 2).reshape(X, T, K).astype(q_XNK.dtype) for x in (k_BTGK, v_BTGK))

    def attend_all(carry: tuple[jax.Array, ...], k_XCK: jax.Array, v_XCK: jax.Array) -> tuple[jax.Array, ...]:
        """With the keys first, XLA:CPU computes maxima and sums of many queries at a time, since their order is not its
        to change: 1.2 times as fast. A mask, which it would exchange, costs more than that."""
        return add(carry, jnp.einsum("XCK,XNK->XCN", k_XCK, q_XNK, preferred_element_type=jnp.float32), v_XCK, 1)

    def attend(
        carry: tuple[jax.Array, ...], k_XCK: jax.Array, v_XCK: jax.Array, mask_TC: jax.Array | np.ndarray
    ) -> tuple[jax.Array, ...]:
        scores_XNC = jnp.einsum("XNK,XCK->XNC", q_XNK, k_XCK, preferred_element_type=jnp.float32)
        return add(carry, jnp.where(jnp.tile(mask_TC, (R, 1)), scores_XNC, -jnp.inf), v_XCK, 2)

    def add(carry: tuple[jax.Array, ...], scores: jax.Array, v_XCK: jax.Array, keys_axis: int) -> tuple[jax.Array, ...]:
        """The maximum, the sum and the weighted values (X, N, K), with more keys, whose scores are (X, C, N) or
        (X, N, C)."""
        most_XN, sum_XN, out_XNK = carry
        now_XN = jnp.maximum(most_XN, jnp.max(scores, axis=keys_axis))
        weights = jnp.exp(scores - jnp.expand_dims(now_XN, keys_axis))
        before_XN = jnp.exp(most_XN - now_XN)
        added_XNK = jnp.einsum(
            "XCN,XCK->XNK" if keys_axis == 1 else "XNC,XCK->XNK",
            weights.astype(v_XCK.dtype),
            v_XCK,
            preferred_element_type=jnp.float32,
        )
        sum_XN = sum_XN * before_XN + jnp.sum(weights, axis=keys_axis)
        return now_XN, sum_XN, out_XNK * before_XN[..., None] + added_XNK

    def block(i: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        part = jax.tree.map(lambda x_XSK: jax.lax.dynamic_slice_in_dim(x_XSK, i * size, size, axis=1), cache)
        return part.plain(q_XNK.dtype)

    def attend_some(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places_C = i * few + jnp.arange(few)
        distance_TC = start + jnp.arange(T)[:, None] - places_C
        return attend(carry, *block(i, few), visible(distance_TC, window) & (places_C < start))

    # A token sees itself, so that from here on there is a largest score.
    nothing = jnp.full((X, R * T), LOWEST), jnp.zeros((X, R * T)), jnp.zeros((X, R * T, K))
    carry = attend(nothing, k_XTK, v_XTK, causal_mask(0, T, 0, T, window)[0])
    first = jnp.maximum(start - window + 1, 0) // few if window else start // few
    if not window:
        n_many = start // many
        carry = jax.lax.fori_loop(0, n_many, lambda i, carry: attend_all(carry, *block(i, many)), carry)
        rest = n_many * (many // few), first
        carry = jax.lax.fori_loop(*rest, lambda i, carry: attend_all(carry, *block(i, few)), carry)
    _, sum_XN, out_XNK = jax.lax.fori_loop(first, (start + few - 1) // few, attend_some, carry)
    out_XRTK = (out_XNK / sum_XN[..., None]).astype(q_BTHK.dtype).reshape(B, X // B, R, T, K)
    return out_XRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def chunk_by_cudnn(q_BTHK: jax.Array, cache: LayerCache, start: jax.Array, window: int) -> jax.Array:
    """cuDNN's kernel, with the mask of the chunk, (1, 1, T, S) in memory; it reads the places up to the chunk's end."""
    B, T = q_BTHK.shape[:2]
    X, S, K = cache.k_XSK.shape
    k_BSGK, v_BSGK = (x.reshape(B, X // B, S, K).swapaxes(1, 2) for x in cache.plain(q_BTHK.dtype))
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=chunk_mask(start, T, S, window)[None, None],
        query_seq_lengths=jnp.full(B, T, jnp.int32),
        key_value_seq_lengths=jnp.full(B, start + T, jnp.int32),
        implementation="cudnn",
    )


def chunk_by_splash(
    q_BTHK: jax.Array, cache: LayerCache, start: jax.Array, window: int, interpret: bool = False
) -> jax.Array:
    """The Splash kernel, which finds the blocks to skip in the mask of the chunk. `interpret` runs it on CPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Slow to import, and for TPUs only.

    B, T, H, K = q_BTHK.shape
    X, S, _ = cache.k_XSK.shape
    R = H * B // X
    mask_RTS = jnp.broadcast_to(chunk_mask(start, T, S, window), (R, T, S))
    kernel = splash.make_splash_mqa_single_device(
        mask_RTS, block_sizes=splash_sizes(splash_block(T), splash_block(S)), interpret=interpret
    )
    # JAX makes an array of this flag, too, which the kernel cannot branch by within a program.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    out_XRTK = jax.vmap(kernel)(heads_of(q_BTHK, X).reshape(X, R, T, K), *cache.plain(q_BTHK.dtype))
    return out_XRTK.reshape(B, X // B, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def chunk_mask(start: jax.Array, T: int, S: int, window: int) -> jax.Array:
    """The mask of T queries from position `start` on over the S places of the cache: bool (T, S)."""
    return visible(start + jnp.arange(T)[:, None] - jnp.arange(S), window)


def heads_of(q_BTHK: jax.Array, X: int) -> jax.Array:
    """Queries divided by sqrt(K), with one row per key/value head of each sequence, and its R query heads one after the
    other: (X, R * T, K)."""
    B, T, H, K = q_BTHK.shape
    G = X // B
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * (1 / np.sqrt(K)).astype(q_BTHK.dtype)
    return q_BTGRK.transpose(0, 2, 3, 1, 4).reshape(X, -1, K)
