"""The layers that a block is made of: linear, norms, dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpt_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from gpt_jax.model.sharding import context_parts

INIT_STD = 0.02  # GPT-2's, for every matrix and embedding.


class Linear(nn.Module):
    """y = x @ kernel + bias, computed in `dtype` from float32 parameters; (..., D) to (..., features).

    The kernel starts as a normal of standard deviation `init_std`, the bias as 0. With adapters (Hu et al. 2022),
    alpha / rank * dropout(x) @ lora_a @ lora_b is added, which starts as 0; x is (B, T, D) then, and `keys_B` decides
    the dropout.
    """

    features: int
    use_bias: bool
    init_std: float
    dtype: DTypeLike
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        D = x.shape[-1]

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            # Flattened to two dimensions: with three, XLA:CPU transposes a copy of the activations for the gradient of
            # every kernel (nano step: 67 to 49 ms). Where sequences are divided, XLA would gather them for that.
            if context_parts() == 1:
                x = x.reshape(-1, x.shape[-1])
            return x.astype(self.dtype) @ kernel.astype(self.dtype)

        if self.has_variable("params", "kernel_FD"):  # Laid out for decoding, by `prepare_params`.
            kernel_FD: jax.Array = self.get_variable("params", "kernel_FD").astype(self.dtype)
            y = decoding_product(x.reshape(-1, D).astype(self.dtype), kernel_FD, self.dtype)
        else:
            y = product(x, self.param("kernel", nn.initializers.normal(self.init_std), (D, self.features)))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.lora is not None:
            rank = self.lora.rank
            a_DR = self.param("lora_a", symmetric_uniform(D**-0.5), (D, rank))
            b_RF = self.param("lora_b", nn.initializers.zeros, (rank, self.features))
            adapted = product(product(dropout(x, self.lora.dropout, keys_B), a_DR), b_RF)
            y = y + adapted * (self.lora.alpha / rank)
        return y.reshape(*x.shape[:-1], self.features)


FEW_ROWS = 64
"""Up to so many rows XLA:CPU multiplies faster with the operands exchanged; 512 rows take a seventh longer."""


def decoding_product(x_ND: jax.Array, kernel_FD: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x @ kernel.T in `dtype` (N, F), multiplied in that of x and added up in float32.

    XLA:CPU copies the right operand of a product into another layout before it multiplies. With the operands exchanged
    that is x, and the kernel is read once, from where it lies: 42 to 30 ms of CPU time for all the kernels of GPT-2
    124M and 8 rows. The barrier keeps XLA from exchanging them back.
    """
    if jax.default_backend() != "cpu" or x_ND.shape[0] > FEW_ROWS:
        return jnp.matmul(x_ND, kernel_FD.T, preferred_element_type=dtype)
    product_FN = jnp.matmul(kernel_FD, x_ND.T, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_FN).T.astype(dtype)


def symmetric_uniform(limit: float) -> nn.initializers.Initializer:
    """Starts parameters uniformly between -limit and limit."""
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -limit, limit)


def linear(config: ModelConfig, name: str, features: int, residual: bool = False) -> Linear:
    """The linear layer that a block calls `name` (one of LORA_TARGETS): its bias, start and adapters by `config`.

    The two layers of a block that write to the residual stream start smaller, the more blocks there are (GPT-2).
    """
    init_std = INIT_STD / float(np.sqrt(2 * config.n_layer)) if residual else INIT_STD
    has_bias = config.has_bias(name if name in ("qkv", "out") else "mlp")
    lora = config.lora if config.lora.rank and name in config.lora.targets else None
    return Linear(features, has_bias, init_std, config.dtype, lora, name=name)


def lora_keys(config: ModelConfig, name: str, keys_B: jax.Array | None) -> jax.Array | None:
    """The dropout keys of the adapters of linear layer `name`, from the keys of its block."""
    return fold_in(keys_B, 8 + LORA_TARGETS.index(name)) if config.lora.rank and config.lora.dropout else None


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba, Kiros and Hinton 2016), computed in float32, returned in `dtype`."""

    use_bias: bool
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * scale_D
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019), computed in float32, returned in `dtype`."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.eps) * scale_D).astype(self.dtype)


def norm(config: ModelConfig, name: str) -> LayerNorm | RMSNorm:
    """The norm of the residual stream that `config` asks for."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, config.dtype, name=name)
    return LayerNorm(config.bias, config.norm_eps, config.dtype, name=name)


def fold_in(keys_B: jax.Array | None, site: int | jax.Array) -> jax.Array | None:
    """Keys for one place in the model, from one key a sequence; None (no dropout) stays None."""
    return None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, site))(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014) of x (B, ...), each sequence by its own key; no keys, no dropout.

    A key a sequence, and not one a batch, makes the dropped units the same however the batch is spread over
    microbatches and devices.
    """
    if keys_B is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), 0)
