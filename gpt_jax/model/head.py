"""Float32 logits of hidden states: one product for training, another for code that needs the logits of few tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.sharding import for_use, mesh_is_set
from gpt_jax.model.weight import decoding_product, int8_product, scale_of


def head_name(params: Params) -> str:
    """The name of the matrix that maps hidden states to logits: the token embeddings, where the head is tied."""
    return "head_VD" if "head_VD" in params else "tokens_VD"


def head_VD(params: Params) -> Any:
    """The matrix that maps hidden states to logits, in float32 if it is int8."""
    name = head_name(params)
    head = for_use({name: params[name]}, params[name].dtype)[name]
    scale_V = params.get(scale_of(name))
    return head if scale_V is None else head * scale_V[:, None]


def logits_NV(model: GPT, params: Params, hidden_ND: jax.Array, n_tokens: int | None = None) -> jax.Array:
    """The float32 logits of hidden states; those of tokens from n_tokens on, or if it is None, of the vocabulary's
    padding, are -inf."""
    name = head_name(params)
    if scale_of(name) in params:
        product_NV = int8_product(hidden_ND, params[name], params[scale_of(name)], jnp.float32)
    else:
        product_NV = decoding_product(hidden_ND, head_VD(params).astype(hidden_ND.dtype), jnp.float32)
    n_tokens = min(n_tokens or model.config.vocab_size, model.config.vocab_size)
    if mesh_is_set() or n_tokens == product_NV.shape[1]:
        return hide_padding(product_NV, n_tokens)
    return product_NV.at[:, n_tokens:].set(-jnp.inf)  # In place: the product is written once.


def head_logits(hidden_ND: jax.Array, head_VD: jax.Array, vocab_size: int, first: int | jax.Array = 0) -> jax.Array:
    """hidden @ head.T, the logits of each token: multiplied in the hidden states' dtype, summed in float32 (N, V).

    The head's rows are those of tokens from `first` on. Tokens from `vocab_size` on are padding, with logits of -inf.
    """
    return hide_padding(head_product(hidden_ND, head_VD), vocab_size, first)


@jax.custom_vjp
def head_product(hidden_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
    """The float32 logits. The gradients multiply in the hidden states' dtype, too. JAX's own would multiply in float32,
    the dtype of the logits, at a fraction of a matrix unit's speed in bfloat16."""
    return jnp.einsum("ND,VD->NV", hidden_ND, head_VD.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)


def head_product_gradients(
    hidden_ND: jax.Array, head_VD: jax.Array, gradient_NV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients with respect to hidden states, in their dtype, and to the head, in float32."""
    dtype = hidden_ND.dtype
    gradient_NV = gradient_NV.astype(dtype)
    to_hidden_ND = jnp.einsum("NV,VD->ND", gradient_NV, head_VD.astype(dtype))
    to_head_VD = jnp.einsum("NV,ND->VD", gradient_NV, hidden_ND, preferred_element_type=jnp.float32)
    return to_hidden_ND, to_head_VD


def _head_product_fwd(hidden_ND: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return head_product(hidden_ND, head_VD), (hidden_ND, head_VD)


def _head_product_bwd(saved: tuple[jax.Array, jax.Array], gradient_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    to_hidden_ND, to_head_VD = head_product_gradients(*saved, gradient_NV)
    return to_hidden_ND, to_head_VD.astype(saved[1].dtype)


head_product.defvjp(_head_product_fwd, _head_product_bwd)


def hide_padding(logits_NV: jax.Array, vocab_size: int, first: int | jax.Array = 0) -> jax.Array:
    """The logits of tokens from `first` on, with -inf for those from `vocab_size` on."""
    V = logits_NV.shape[1]
    if isinstance(first, int) and first + V <= vocab_size:
        return logits_NV
    return jnp.where(first + jnp.arange(V) < vocab_size, logits_NV, -jnp.inf)
