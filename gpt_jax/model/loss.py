"""Next-token cross-entropy, in float32, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp


def head_logits(hidden_ND: jax.Array, head_VD: jax.Array, vocab_size: int) -> jax.Array:
    """hidden @ head.T, the logits of each token: multiplied in the hidden states' dtype, added up in float32 (N, V).

    Rows of the head from `vocab_size` on are padding, and their logits -inf.
    """
    return hide_padding(head_product(hidden_ND, head_VD), vocab_size)


@jax.custom_vjp
def head_product(hidden_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
    """The float32 logits. Its gradients multiply in the hidden states' dtype, too: those that JAX derives would do so
    in float32, that of the logits, at a fraction of a matrix unit's speed in bfloat16."""
    return jnp.einsum("ND,VD->NV", hidden_ND, head_VD.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)


def _head_product_fwd(hidden_ND: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return head_product(hidden_ND, head_VD), (hidden_ND, head_VD)


def _head_product_bwd(saved: tuple[jax.Array, jax.Array], gradient_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden_ND, head_VD = saved
    dtype = hidden_ND.dtype
    gradient_NV = gradient_NV.astype(dtype)
    to_hidden_ND = jnp.einsum("NV,VD->ND", gradient_NV, head_VD.astype(dtype))
    to_head_VD = jnp.einsum("NV,ND->VD", gradient_NV, hidden_ND, preferred_element_type=jnp.float32)
    return to_hidden_ND, to_head_VD.astype(head_VD.dtype)


head_product.defvjp(_head_product_fwd, _head_product_bwd)


def hide_padding(logits_NV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits, those from `vocab_size` on -inf."""
    V = logits_NV.shape[1]
    return logits_NV if vocab_size == V else jnp.where(jnp.arange(V) < vocab_size, logits_NV, -jnp.inf)


def cross_entropy_N(hidden_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array, vocab_size: int) -> jax.Array:
    """-log softmax(logits)[target] of each token, in nats, float32 (N,)."""
    logits_NV = head_logits(hidden_ND, head_VD, vocab_size)
    target_logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=-1) - target_logits_N


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
    """
    n, d = targets_BT.size, hidden_BTD.shape[-1]
    hidden_ND, targets_N = hidden_BTD.reshape(n, d), targets_BT.reshape(n)
    mask_N = mask_BT.reshape(n).astype(jnp.float32)
    if n <= chunk:
        return jnp.vdot(cross_entropy_N(hidden_ND, head_VD, targets_N, vocab_size), mask_N), jnp.sum(mask_N)

    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # As even as can be, so that little is padded.
    padding = n_chunks * chunk - n

    def chunked(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(n_chunks, chunk, *x.shape[1:])

    @jax.checkpoint
    def add_chunk(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C, mask_C = xs
        losses_C = cross_entropy_N(hidden_CD, head_VD, targets_C, vocab_size)
        return total + jnp.vdot(losses_C, mask_C), None

    total, _ = jax.lax.scan(add_chunk, jnp.float32(0), (chunked(hidden_ND), chunked(targets_N), chunked(mask_N)))
    return total, jnp.sum(mask_N)
