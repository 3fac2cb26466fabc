"""Next-token cross-entropy, in float32, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp


def head_logits(hidden_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
    """hidden @ head.T, the logits of each token: multiplied in the hidden states' dtype, added up in float32 (N, V)."""
    return jnp.einsum("ND,VD->NV", hidden_ND, head_VD.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)


def cross_entropy_N(hidden_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each token, in nats, float32 (N,)."""
    logits_NV = head_logits(hidden_ND, head_VD)
    target_logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits_N


def loss_sums(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of the masked cross-entropies in nats, and of the mask: two float32 scalars to add up, then divide.

    At most `chunk` tokens have logits at one time: the chunks are scanned over, and each one's logits are computed
    again in the backward pass. With 50,000 tokens in the vocabulary, the logits of a batch and their gradient would
    otherwise be the largest arrays of the whole step.
    """
    n, d = targets_BT.size, hidden_BTD.shape[-1]
    hidden_ND, targets_N = hidden_BTD.reshape(n, d), targets_BT.reshape(n)
    mask_N = mask_BT.reshape(n).astype(jnp.float32)
    if n <= chunk:
        return jnp.vdot(cross_entropy_N(hidden_ND, head_VD, targets_N), mask_N), jnp.sum(mask_N)

    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # As even as can be, so that little is padded.
    padding = n_chunks * chunk - n

    def chunked(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(n_chunks, chunk, *x.shape[1:])

    @jax.checkpoint
    def add_chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C, mask_C = xs
        return total + jnp.vdot(cross_entropy_N(hidden_CD, head_VD, targets_C), mask_C), None

    total, _ = jax.lax.scan(add_chunk, jnp.float32(0), (chunked(hidden_ND), chunked(targets_N), chunked(mask_N)))
    return total, jnp.sum(mask_N)
