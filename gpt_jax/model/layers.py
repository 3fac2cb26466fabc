"""The layers of a block: linear, norms, dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt_jax.config import ModelConfig
from gpt_jax.model.weight import product

INIT_STD = 0.02  # GPT-2's, for every matrix and embedding.

ACTIVATIONS = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # Hendrycks and Gimpel 2016, its tanh form.
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "relu": nn.relu,
}


class Linear(nn.Module):
    """y = x @ kernel + bias, computed in `dtype` from float32 parameters; (..., D) to (..., features).

    The kernel starts as a normal of standard deviation `init_std`, the bias as 0. The kernel may be of any kind that
    model/weight.py knows. keys_B are for subclasses with dropout, such as `lora.AdaptedLinear`; this layer has none.
    """

    features: int
    use_bias: bool
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        if self.is_initializing():
            self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features))
        y = product(x, self.variables["params"], self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


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
    """A norm of the residual stream, of the kind that `config` asks for."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, config.dtype, name=name)
    return LayerNorm(config.bias, config.norm_eps, config.dtype, name=name)


def fold_in(keys_B: jax.Array | None, site: int | jax.Array) -> jax.Array | None:
    """The keys of one site in the model, from one key per sequence; None (no dropout) stays None."""
    return None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, site))(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014) of x (B, ...), each sequence by its own key; None: no dropout.

    One key per sequence, rather than per batch, makes the dropped units the same however the batch is divided over
    microbatches and devices.
    """
    if keys_B is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), 0)
