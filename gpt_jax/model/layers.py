"""The layers of a block: linear, activations, norms, dropout.

Activations and norms have gradients of their own, which save their input, and of norms two numbers a row, and compute
the rest again: to write it to memory and read it from there would take longer.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt_jax.config import ModelConfig
from gpt_jax.model.weight import product

INIT_STD = 0.02  # GPT-2's, for every matrix and embedding.


def recomputed(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A function of one array whose gradient saves nothing but that array."""

    def gradient(x: jax.Array, to_y: jax.Array) -> tuple[jax.Array]:
        # The barrier keeps XLA from finding that the forward pass computed the same, and saving it after all.
        (to_x,) = jax.vjp(function, jax.lax.optimization_barrier(x))[1](to_y)
        return (to_x,)

    saving_little = jax.custom_vjp(function)
    saving_little.defvjp(lambda x: (function(x), x), gradient)
    return saving_little


ACTIVATIONS = {
    "gelu_tanh": recomputed(lambda x: nn.gelu(x, approximate=True)),  # Hendrycks and Gimpel 2016, its tanh form.
    "gelu": recomputed(lambda x: nn.gelu(x, approximate=False)),
    "silu": recomputed(nn.silu),
    "relu": recomputed(nn.relu),
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
        bias_D = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else None
        return normalize(x, scale_D, bias_D, self.eps, True, self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019), computed in float32, returned in `dtype`."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return normalize(x, scale_D, None, self.eps, False, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float, centre: bool, dtype: DTypeLike
) -> jax.Array:
    """x / rms(x) * scale + bias over the last axis, without its mean first if `centre`, computed in float32."""
    return _normalize_fwd(x, scale_D, bias_D, eps, centre, dtype)[0]


def _normalize_fwd(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float, centre: bool, dtype: DTypeLike
) -> tuple[jax.Array, Any]:
    centred, mean = x.astype(jnp.float32), None
    if centre:
        mean = jnp.mean(centred, axis=-1, keepdims=True)
        centred = centred - mean
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse_rms * scale_D
    if bias_D is not None:
        y = y + bias_D
    return y.astype(dtype), (x, mean, inverse_rms, scale_D, bias_D)


def _normalize_bwd(eps: float, centre: bool, dtype: DTypeLike, saved: Any, to_y: jax.Array) -> tuple[Any, ...]:
    x, mean, inverse_rms, scale_D, bias_D = saved
    # The barrier makes XLA read two numbers a row. It would compute them again, and for that write y to memory.
    mean, inverse_rms = jax.lax.optimization_barrier((mean, inverse_rms))
    to_y, y = to_y.astype(jnp.float32), x.astype(jnp.float32)  # y: before scale and bias.
    if centre:
        y = y - mean
    y = y * inverse_rms
    rows = tuple(range(x.ndim - 1))
    to_normal = to_y * scale_D
    to_x = to_normal - y * jnp.mean(to_normal * y, axis=-1, keepdims=True)
    if centre:
        to_x = to_x - jnp.mean(to_normal, axis=-1, keepdims=True)
    to_bias_D = None if bias_D is None else jnp.sum(to_y, axis=rows)
    return (to_x * inverse_rms).astype(x.dtype), jnp.sum(to_y * y, axis=rows), to_bias_D


normalize.defvjp(_normalize_fwd, _normalize_bwd)


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
