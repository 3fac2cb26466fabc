"""Matrix products for each kind of weight: a plain kernel (D, F), or one transposed for decoding, (F, D), which may be
int8 with a scale for each of its rows."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import DTypeLike

from gpt_jax.model.sharding import context_parts

FEW_ROWS, FEW_RESULTS = 64, 2**20
"""XLA:CPU multiplies up to so many rows, for up to so many results, faster with the operands exchanged. 512 rows take a
seventh longer; and results that fit no cache, such as the logits of 64 rows, would take long to be exchanged back."""

LEAST_STEP = 1e-30
"""What a step of rounding is at least, since numbers are divided by it."""


def product(x: jax.Array, weights: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
    """x (..., D) times the matrix of a linear layer, in `dtype`: (N, F), or (..., F) where sequences are divided.

    weights: the layer's parameters, with `kernel`, or with `kernel_FD` from `sample.decode.prepare_params`, and there
    may be `lora.Adapters` beside that.
    """
    if "kernel_FD" in weights:
        x_ND, kernel_FD = x.reshape(-1, x.shape[-1]).astype(dtype), weights["kernel_FD"]
        if "scale_F" in weights:
            y_NF = int8_product(x_ND, kernel_FD, weights["scale_F"], dtype)
        else:
            y_NF = decoding_product(x_ND, kernel_FD.astype(dtype), dtype)
        return y_NF + adapters_product(x_ND, weights, dtype) if "scales_BR" in weights else y_NF
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
    if x_ND.shape[0] > FEW_ROWS or x_ND.shape[0] * kernel_FD.shape[0] > FEW_RESULTS:
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


def int8_product(x_ND: jax.Array, kernel_FD: jax.Array, scale_F: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x @ (kernel * scale).T in `dtype` (N, F), where kernel is int8 and scale float32.

    Accelerators convert the kernel while they multiply, in the dtype of x, and sum in float32. CPUs multiply and sum
    integers, see `int8_product_on_cpu`.
    """
    product_NF = jax.lax.platform_dependent(x_ND, kernel_FD, cpu=int8_product_on_cpu, default=int8_product_as_it_stands)
    return (product_NF * scale_F).astype(dtype)


def int8_product_as_it_stands(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """x @ kernel.T, float32."""
    return jnp.matmul(x_ND, kernel_FD.astype(x_ND.dtype).T, preferred_element_type=jnp.float32)


def int8_product_on_cpu(x_ND: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """x @ kernel.T, float32, with each row of x rounded to at most 15 bits, as many as sums of int32 have room for.

    For a product with float32, XLA:CPU would convert the kernel in memory. Integers it multiplies as they are: matrices
    of int8, for which x is divided in two, and one row of int16. Sums of integers are the same in any order, so that
    the product of a row does not depend on how many others there are.
    """
    if len(x_ND) > 1:
        return int8_einsum("MD,FD->MF", x_ND, kernel_FD)
    x_1D, step_11 = integers(x_ND)
    return int16_product(x_1D[0].astype(jnp.int16), kernel_FD)[None].astype(jnp.float32) * step_11


def integers(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x, int32, and what it is to be multiplied by, float32 (..., 1): the largest of each row becomes 127 * 128, or
    less, where the sum of a row times 127 would not be an int32."""
    most = min(127 * 128, (2**31 - 1) // (127 * x.shape[-1]))
    x = x.astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), LEAST_STEP) / most
    # The barrier keeps XLA:CPU from rounding once more for each of the two parts that these are taken apart into.
    return jax.lax.optimization_barrier(jnp.round(x / step).astype(jnp.int32)), step


def int8_einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of rows, float32: x (..., N, D), which is rounded to integers, with y, int8, of which `spec` says how.

    x becomes two numbers of 8 bits each, in rows of their own. A concatenation of them is what XLA:CPU finds no vectors
    for.
    """
    x, step = integers(x)
    high = (x + 64) >> 7
    is_high = jnp.arange(2)[:, None, None] == 0
    parts = jnp.where(is_high, high[..., None, :, :], (x - (high << 7))[..., None, :, :]).astype(jnp.int8)
    parts = parts.reshape(*x.shape[:-2], -1, x.shape[-1])
    high, low = jnp.split(jnp.einsum(spec, parts, y, preferred_element_type=jnp.int32), 2, axis=-2)
    return (128 * high + low).astype(jnp.float32) * step


def apart(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, which XLA compiles apart: it fuses nothing inside with anything outside. XLA:CPU would compute
    what stands before a product, such as a norm, for every row of the matrix anew."""
    jitted = jax.jit(function)

    @functools.wraps(function)
    def called(*args: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jitted(*args)

    return called


@apart
def int16_product(x_D: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """kernel @ x, int32 (F,), where x is int16 and kernel int8. Where the compiler sees both conversions, it takes the
    processor's instruction for products of int16, which is faster than that for int32."""
    return jnp.dot(x_D.astype(jnp.int32), kernel_FD.astype(jnp.int32).T)


def adapters_product(x_ND: jax.Array, weights: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
    """What adapters add to the product of each row, in `dtype` (N, F). All rows are multiplied by all adapters, and
    those that are not a row's own are scaled by 0, so that one program serves every choice."""
    inner_NR, scales_BR = decoding_product(x_ND, weights["lora_a_RD"], jnp.float32), weights["scales_BR"]
    scaled_NR = inner_NR * jnp.repeat(scales_BR, len(x_ND) // len(scales_BR), axis=0)
    return decoding_product(scaled_NR.astype(dtype), weights["lora_b_FR"], dtype)


def scale_of(name: str) -> str:
    """The name of the scales of a matrix in int8, one for each of its rows: scale_F of kernel_FD."""
    matrix, _, dims = name.rpartition("_")
    return f"{'' if matrix == 'kernel' else matrix + '_'}scale_{dims[0]}"
