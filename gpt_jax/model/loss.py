"""The negative log-likelihood of tokens in nats, float32, without ever holding the logits of all tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gpt_jax.model.head import head_logits, head_product_gradients
from gpt_jax.model.loss_kernel import BLOCK, LARGEST, nats_and_gradient_by_kernel
from gpt_jax.model.sharding import BATCH_AXES, TOKEN_AXES, mesh_is_set

Adjust = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits_NV, targets_N)` to logits of the same shape."""


def nats_N(
    logits_NV: jax.Array, targets_N: jax.Array, first: int | jax.Array = 0, axis_name: str | None = None
) -> jax.Array:
    """-log softmax(logits)[target] of each token in nats, (N,), for training, evaluation, scoring and sampling.

    axis_name: a mapped axis, if each of its devices has the logits of a part of the vocabulary, from token `first` on.
    They exchange a few numbers per token, and the logits stay where they are (Shoeybi et al. 2019, section 3).
    """
    logsumexp_N, target_logits_N = logsumexp_and_target(logits_NV, targets_N, first, axis_name)
    return logsumexp_N - target_logits_N


def logsumexp_and_target(
    logits_NV: jax.Array, targets_N: jax.Array, first: int | jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """log(sum(exp(logits))) and the target's logit of each token, (N,) both; see `nats_N`."""
    if axis_name is None:
        target_logits_N1 = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)
        return jax.nn.logsumexp(logits_NV, axis=-1), target_logits_N1[:, 0]
    highest_N = jax.lax.pmax(jax.lax.stop_gradient(logits_NV).max(axis=-1), axis_name)
    sums_N = jax.lax.psum(jnp.sum(jnp.exp(logits_NV - highest_N[:, None]), axis=-1), axis_name)
    local_targets_N = targets_N - first
    is_local_N = (local_targets_N >= 0) & (local_targets_N < logits_NV.shape[1])
    target_logits_N = jnp.take_along_axis(logits_NV, jnp.where(is_local_N, local_targets_N, 0)[:, None], axis=-1)[:, 0]
    target_logits_N = jax.lax.psum(jnp.where(is_local_N, target_logits_N, 0), axis_name)
    return highest_N + jnp.log(sums_N), target_logits_N


def nats_and_gradient(
    logits_NV: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    dtype: DTypeLike,
    first: int | jax.Array = 0,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The nats of each target (N,), and in `dtype` the gradient of their sum times `weights` by the logits (N, V); see
    `nats_N`. On an NVIDIA GPU that has all of a large vocabulary, a kernel reads the logits fewer times."""

    def formula(logits_NV: jax.Array, targets_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        logsumexp_N, target_logits_N = logsumexp_and_target(logits_NV, targets_N, first, axis_name)
        is_target_NV = first + jnp.arange(logits_NV.shape[1]) == targets_N[:, None]
        gradient_NV = (jnp.exp(logits_NV - logsumexp_N[:, None]) - is_target_NV) * weights_N[:, None]
        return logsumexp_N - target_logits_N, gradient_NV.astype(dtype)

    if axis_name or logits_NV.shape[1] < BLOCK or logits_NV.size > LARGEST:
        return formula(logits_NV, targets_N, weights_N)
    kernel = functools.partial(nats_and_gradient_by_kernel, dtype=dtype)
    return jax.lax.platform_dependent(logits_NV, targets_N, weights_N, cuda=kernel, default=formula)


def sum_of_nats(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """The sum of the targets' nats under the logits hidden @ head.T, times weights_BT (float32): float32 (),
    differentiable by hidden states and head.

    At most `chunk` tokens have logits at one time: with 50,000 tokens in the vocabulary, the logits of a batch and
    their gradient would otherwise be the largest arrays of the whole step. Where the loss of a chunk is computed, so
    are its gradients, from the same logits; the backward pass multiplies them by the gradient of the sum (Hsu et al.
    2024, Liger Kernel). If it computed the logits again, the head would multiply four times in place of three.

    On a mesh, each device does so with its tokens and its part of the vocabulary.
    """
    if not mesh_is_set():
        return sum_in_chunks(hidden_BTD, head_VD, targets_BT, weights_BT, vocab_size, chunk, None)

    def on_one_device(
        hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> jax.Array:
        tokens = *shared(hidden_BTD, head_VD), targets_BT, weights_BT
        return jax.lax.psum(sum_in_chunks(*tokens, vocab_size, chunk, "tensor"), TOKEN_AXES)

    in_specs = (TOKENS, PartitionSpec("tensor"), TOKENS, TOKENS)
    return jax.shard_map(on_one_device, in_specs=in_specs, out_specs=PartitionSpec())(
        hidden_BTD, head_VD, targets_BT, weights_BT
    )


def nats_of_tokens(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    adjust: Adjust | None = None,
) -> jax.Array:
    """The nats of each target, float32 (B, T), differentiable by hidden states and head: for losses that are no
    weighted sum of them. Otherwise as `sum_of_nats`. adjust: changes the logits; filters need those of all tokens."""
    if not mesh_is_set():
        return nats_in_chunks(hidden_BTD, head_VD, targets_BT, vocab_size, chunk, adjust=adjust)

    def on_one_device(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        tokens = *shared(hidden_BTD, head_VD), targets_BT
        return nats_in_chunks(*tokens, vocab_size, chunk, "tensor", adjust)

    in_specs = (TOKENS, PartitionSpec("tensor"), TOKENS)
    return jax.shard_map(on_one_device, in_specs=in_specs, out_specs=TOKENS)(hidden_BTD, head_VD, targets_BT)


TOKENS = PartitionSpec(BATCH_AXES, "context")
"""How arrays (B, T) and (B, T, D) are divided."""


def shared(hidden_BTD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are. The gradient of a shared array is the sum of the devices' gradients: pcast is transposed to
    that sum."""
    return jax.lax.pcast(hidden_BTD, "tensor", to="varying"), jax.lax.pcast(head_VD, TOKEN_AXES, to="varying")


def nats_in_chunks(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    vocabulary_axis: str | None = None,
    adjust: Adjust | None = None,
) -> jax.Array:
    """The nats of each target, float32 (B, T), of the tokens of one device. Differentiable, for losses of other forms:
    the backward pass computes the logits of a chunk again. vocabulary_axis: the mapped axis that divides the head's
    rows, if any."""

    def nats(hidden_ND: jax.Array, targets_N: jax.Array) -> jax.Array:
        logits_NV, first = logits_and_first(hidden_ND, head_VD, vocab_size, vocabulary_axis)
        logits_NV = adjust(logits_NV, targets_N) if adjust else logits_NV
        return nats_N(logits_NV, targets_N, first, vocabulary_axis)

    n = targets_BT.size
    flat = hidden_BTD.reshape(n, -1), targets_BT.reshape(n)
    if n <= chunk:
        return nats(*flat).reshape(targets_BT.shape)
    nats_of_chunk = jax.checkpoint(nats)
    all_nats = jax.lax.map(lambda xs: nats_of_chunk(*xs), chunked(flat, chunk))
    return all_nats.reshape(-1)[:n].reshape(targets_BT.shape)


def logits_and_first(
    hidden_ND: jax.Array, head_VD: jax.Array, vocab_size: int, vocabulary_axis: str | None
) -> tuple[jax.Array, int | jax.Array]:
    """The logits of a device's part of the vocabulary, and the first token of it."""
    first = 0 if vocabulary_axis is None else jax.lax.axis_index(vocabulary_axis) * head_VD.shape[0]
    return head_logits(hidden_ND, head_VD, vocab_size, first), first


def chunked(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """Arrays (N, ...) as (chunks, at most `chunk`, ...), padded with zeros. Chunks of even size need little padding."""
    n = len(arrays[0])
    n_chunks = -(-n // chunk)
    size = -(-n // n_chunks)

    def divide(x: jax.Array) -> jax.Array:
        padding = [(0, n_chunks * size - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(n_chunks, size, *x.shape[1:])

    return tuple(map(divide, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def sum_in_chunks(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    vocabulary_axis: str | None,
) -> jax.Array:
    """`sum_of_nats` of the tokens of one device. vocabulary_axis: the mapped axis that divides the head's rows."""
    return jnp.sum(nats_in_chunks(hidden_BTD, head_VD, targets_BT, vocab_size, chunk, vocabulary_axis) * weights_BT)


def _sum_in_chunks_fwd(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    vocabulary_axis: str | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    def of_chunk(hidden_ND: jax.Array, targets_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, ...]:
        logits_NV, first = logits_and_first(hidden_ND, head_VD, vocab_size, vocabulary_axis)
        nats_N, gradient_NV = nats_and_gradient(
            logits_NV, targets_N, weights_N, hidden_ND.dtype, first, vocabulary_axis
        )
        return nats_N, *head_product_gradients(hidden_ND, head_VD, gradient_NV)

    def next_chunk(to_head_VD: jax.Array, xs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        nats_N, to_hidden_ND, more_VD = of_chunk(*xs)
        return to_head_VD + more_VD, (nats_N, to_hidden_ND)

    n = targets_BT.size
    flat = hidden_BTD.reshape(n, -1), targets_BT.reshape(n), weights_BT.reshape(n)
    if n <= chunk:
        nats_N, to_hidden_ND, to_head_VD = of_chunk(*flat)
    else:
        none_VD = jnp.zeros_like(head_VD, jnp.float32)
        to_head_VD, (nats_CN, to_hidden_CND) = jax.lax.scan(next_chunk, none_VD, chunked(flat, chunk))
        nats_N, to_hidden_ND = nats_CN.reshape(-1)[:n], to_hidden_CND.reshape(-1, flat[0].shape[1])[:n]
    nats_BT = nats_N.reshape(targets_BT.shape)
    return jnp.sum(nats_BT * weights_BT), (to_hidden_ND.reshape(hidden_BTD.shape), to_head_VD, nats_BT)


def _sum_in_chunks_bwd(
    vocab_size: int, chunk: int, vocabulary_axis: str | None, gradients: Any, gradient: jax.Array
) -> tuple[Any, ...]:
    to_hidden_BTD, to_head_VD, nats_BT = gradients
    return to_hidden_BTD * gradient.astype(to_hidden_BTD.dtype), to_head_VD * gradient, None, nats_BT * gradient


sum_in_chunks.defvjp(_sum_in_chunks_fwd, _sum_in_chunks_bwd)
