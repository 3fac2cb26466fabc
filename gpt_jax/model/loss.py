"""Next-token cross-entropy, in float32, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt_jax.model.head import head_logits, head_product, hide_padding
from gpt_jax.model.sharding import BATCH_AXES, TOKEN_AXES, mesh_is_set


def cross_entropy_N(
    hidden_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array, vocab_size: int, axis_name: str | None = None
) -> jax.Array:
    """-log softmax(logits)[target] of each token, in nats, float32 (N,).

    With a mapped axis, each of its devices has a part of the vocabulary, in order, and what is added up over them is
    one number a token: the logits stay where they are (Shoeybi et al. 2019, section 3).
    """
    if axis_name is None:
        logits_NV = head_logits(hidden_ND, head_VD, vocab_size)
        target_logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits_N

    V = head_VD.shape[0]  # Of this device.
    first = jax.lax.axis_index(axis_name) * V
    logits_NV = hide_padding(head_product(hidden_ND, head_VD), vocab_size, first)
    highest_N = jax.lax.pmax(jax.lax.stop_gradient(logits_NV).max(axis=-1), axis_name)
    sums_N = jax.lax.psum(jnp.sum(jnp.exp(logits_NV - highest_N[:, None]), axis=-1), axis_name)
    here_N = targets_N - first
    is_here_N = (here_N >= 0) & (here_N < V)
    target_logits_N = jnp.take_along_axis(logits_NV, jnp.where(is_here_N, here_N, 0)[:, None], axis=-1)[:, 0]
    target_logits_N = jax.lax.psum(jnp.where(is_here_N, target_logits_N, 0), axis_name)
    return highest_N + jnp.log(sums_N) - target_logits_N


def loss_sums(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    vocab_size: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the masked cross-entropies in nats, and of the mask: two float32 scalars to add up, then divide.

    At most `chunk` tokens have logits at one time: the chunks are scanned over, and each one's logits are computed
    again in the backward pass. With 50,000 tokens in the vocabulary, the logits of a batch and their gradient would
    otherwise be the largest arrays of the whole step.

    On a mesh, each device does so with its tokens and its part of the vocabulary, and the sums are those of all.
    """
    if not mesh_is_set():
        return sums_of_chunks(hidden_BTD, head_VD, targets_BT, mask_BT, vocab_size, chunk)

    def on_one_device(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, head_VD, targets_BT, mask_BT = arrays
        # What several devices have alike has the sum of their gradients: that is the transpose of these two lines.
        hidden_BTD = jax.lax.pcast(hidden_BTD, "tensor", to="varying")
        head_VD = jax.lax.pcast(head_VD, TOKEN_AXES, to="varying")
        sums = sums_of_chunks(hidden_BTD, head_VD, targets_BT, mask_BT, vocab_size, chunk, "tensor", TOKEN_AXES)
        return jax.lax.psum(sums, TOKEN_AXES)

    tokens = PartitionSpec(BATCH_AXES, "context")
    return jax.shard_map(
        on_one_device, in_specs=(tokens, PartitionSpec("tensor"), tokens, tokens), out_specs=PartitionSpec()
    )(hidden_BTD, head_VD, targets_BT, mask_BT)


def sums_of_chunks(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    vocab_size: int,
    chunk: int,
    vocabulary_axis: str | None = None,
    token_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """`loss_sums` of the tokens that one device has. token_axes: the mapped axes that divide them."""
    n, d = targets_BT.size, hidden_BTD.shape[-1]
    hidden_ND, targets_N = hidden_BTD.reshape(n, d), targets_BT.reshape(n)
    mask_N = mask_BT.reshape(n).astype(jnp.float32)
    if n <= chunk:
        losses_N = cross_entropy_N(hidden_ND, head_VD, targets_N, vocab_size, vocabulary_axis)
        return jnp.vdot(losses_N, mask_N), jnp.sum(mask_N)

    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # As even as can be, so that little is padded.
    padding = n_chunks * chunk - n

    def chunked(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(n_chunks, chunk, *x.shape[1:])

    @jax.checkpoint
    def add_chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C, mask_C = xs
        losses_C = cross_entropy_N(hidden_CD, head_VD, targets_C, vocab_size, vocabulary_axis)
        return total + jnp.vdot(losses_C, mask_C), None

    zero = jax.lax.pcast(jnp.float32(0), token_axes, to="varying") if token_axes else jnp.float32(0)
    total, _ = jax.lax.scan(add_chunk, zero, (chunked(hidden_ND), chunked(targets_N), chunked(mask_N)))
    return total, jnp.sum(mask_N)
