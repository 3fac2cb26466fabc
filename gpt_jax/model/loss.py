"""The negative log-likelihood of tokens in nats, float32, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt_jax.model.head import head_logits, head_product, hide_padding
from gpt_jax.model.sharding import BATCH_AXES, TOKEN_AXES, mesh_is_set


def nats_N(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each token in nats, (N,), for training, evaluation, scoring and sampling."""
    target_logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits_N


def nats_of_parts_N(logits_NV: jax.Array, targets_N: jax.Array, first: jax.Array, axis_name: str) -> jax.Array:
    """`nats_N`, where each device of a mapped axis has the logits of a part of the vocabulary, from token `first` on.

    The devices exchange a few numbers per token, and the logits stay where they are (Shoeybi et al. 2019, section 3).
    """
    V = logits_NV.shape[1]
    highest_N = jax.lax.pmax(jax.lax.stop_gradient(logits_NV).max(axis=-1), axis_name)
    sums_N = jax.lax.psum(jnp.sum(jnp.exp(logits_NV - highest_N[:, None]), axis=-1), axis_name)
    local_targets_N = targets_N - first
    is_local_N = (local_targets_N >= 0) & (local_targets_N < V)
    target_logits_N = jnp.take_along_axis(logits_NV, jnp.where(is_local_N, local_targets_N, 0)[:, None], axis=-1)[:, 0]
    target_logits_N = jax.lax.psum(jnp.where(is_local_N, target_logits_N, 0), axis_name)
    return highest_N + jnp.log(sums_N) - target_logits_N


def nats_BT(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int) -> jax.Array:
    """The nats of each target under the logits hidden @ head.T, float32 (B, T), differentiable.

    At most `chunk` tokens have logits at one time: the chunks run one after the other, and the backward pass computes
    their logits again. With 50,000 tokens in the vocabulary, the logits of a batch and their gradient would otherwise
    be the largest arrays of the whole step.

    On a mesh, each device does so with its tokens and its part of the vocabulary.
    """
    if not mesh_is_set():
        return nats_in_chunks(hidden_BTD, head_VD, targets_BT, vocab_size, chunk)

    def on_one_device(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        # The gradient of a shared array is the sum of the devices' gradients: pcast is transposed to that sum.
        hidden_BTD = jax.lax.pcast(hidden_BTD, "tensor", to="varying")
        head_VD = jax.lax.pcast(head_VD, TOKEN_AXES, to="varying")
        return nats_in_chunks(hidden_BTD, head_VD, targets_BT, vocab_size, chunk, "tensor")

    tokens = PartitionSpec(BATCH_AXES, "context")
    return jax.shard_map(on_one_device, in_specs=(tokens, PartitionSpec("tensor"), tokens), out_specs=tokens)(
        hidden_BTD, head_VD, targets_BT
    )


def nats_in_chunks(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    vocabulary_axis: str | None = None,
) -> jax.Array:
    """`nats_BT` of the tokens of one device. vocabulary_axis: the mapped axis that divides the head's rows, if any."""

    def nats(hidden_ND: jax.Array, targets_N: jax.Array) -> jax.Array:
        if vocabulary_axis is None:
            return nats_N(head_logits(hidden_ND, head_VD, vocab_size), targets_N)
        first = jax.lax.axis_index(vocabulary_axis) * head_VD.shape[0]
        logits_NV = hide_padding(head_product(hidden_ND, head_VD), vocab_size, first)
        return nats_of_parts_N(logits_NV, targets_N, first, vocabulary_axis)

    n, d = targets_BT.size, hidden_BTD.shape[-1]
    hidden_ND, targets_N = hidden_BTD.reshape(n, d), targets_BT.reshape(n)
    if n <= chunk:
        return nats(hidden_ND, targets_N).reshape(targets_BT.shape)

    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # Chunks of even size need little padding.

    def chunked(x: jax.Array) -> jax.Array:
        padding = [(0, n_chunks * chunk - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(n_chunks, chunk, *x.shape[1:])

    nats_of_chunk = jax.checkpoint(nats)
    all_nats = jax.lax.map(lambda xs: nats_of_chunk(*xs), (chunked(hidden_ND), chunked(targets_N)))
    return all_nats.reshape(-1)[:n].reshape(targets_BT.shape)
