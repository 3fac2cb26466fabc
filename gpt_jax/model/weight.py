"""Matrix products for each kind of weight: a plain kernel (D, F), or one transposed for decoding, (F, D)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt_jax.model.sharding import context_parts

FEW_ROWS = 64
"""XLA:CPU multiplies up to so many rows faster with the operands exchanged; 512 rows take a seventh longer."""


def product(x: jax.Array, weights: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
    """x (..., D) times the matrix of a linear layer, in `dtype`: (N, F), or (..., F) where sequences are divided.

    weights: the layer's parameters, with `kernel`, or with `kernel_FD` from `sample.decode.prepare_params`.
    """
    if "kernel_FD" in weights:
        return decoding_product(x.reshape(-1, x.shape[-1]).astype(dtype), weights["kernel_FD"].astype(dtype), dtype)
    return plain_product(x, weights["kernel"], dtype)


def plain_product(x: jax.Array, kernel_DF: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x @ kernel, both converted to `dtype`: (N, F), or (..., F) where sequences are divided."""
    # Flattened to two dimensions: with three, XLA:CPU transposes a copy of the activations for the gradient of every
    # kernel (nano step: 67 to 49 ms). Where sequences are divided, XLA would gather them to flatten them.
    if context_parts() == 1:
        x = x.reshape(-1, x.shape[-1])
    return x.astype(dtype) @ kernel_DF.astype(dtype)


def decoding_product(x_ND: jax.Array, kernel_FD: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x @ kernel.T in `dtype` (N, F), multiplied in the dtype of x and summed in float32.

    XLA:CPU copies the right operand of a product into another layout before it multiplies. With the operands exchanged
    that is x, and the kernel is read once, in place: 42 to 30 ms of CPU time for all the kernels of GPT-2 124M and 8
    rows. The platform that a program is compiled for decides between the two.
    """
    if x_ND.shape[0] > FEW_ROWS:
        return product_as_it_stands(x_ND, kernel_FD, dtype)
    return jax.lax.platform_dependent(
        x_ND,
        kernel_FD,
        cpu=functools.partial(product_exchanged, dtype=dtype),
        default=functools.partial(product_as_it_stands, dtype=dtype),
    )


def product_as_it_stands(x_ND: jax.Array, kernel_FD: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x @ kernel.T."""
    return jnp.matmul(x_ND, kernel_FD.T, preferred_element_type=dtype)


def product_exchanged(x_ND: jax.Array, kernel_FD: jax.Array, dtype: DTypeLike) -> jax.Array:
    """(kernel @ x.T).T. The barrier keeps XLA from exchanging the operands back."""
    product_FN = jnp.matmul(kernel_FD, x_ND.T, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_FN).T.astype(dtype)
