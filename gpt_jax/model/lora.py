"""Adapters (Hu et al. 2022): the product that they add to a linear layer, and their place in the parameter tree."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from gpt_jax.model.layers import INIT_STD, Linear, dropout, fold_in
from gpt_jax.model.weight import plain_product

ADAPTERS = ("lora_a", "lora_b")
"""The names of the adapters in the parameters of a linear layer."""


class AdaptedLinear(Linear):
    """A linear layer plus alpha / rank * dropout(x) @ lora_a @ lora_b, which starts as 0.

    x is (B, T, D). The dropout depends on `keys_B`, the keys of the block, and on the layer's name.
    """

    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        y = super().__call__(x)
        D, rank = x.shape[-1], self.lora.rank
        a_DR = self.param("lora_a", symmetric_uniform(D**-0.5), (D, rank))
        b_RF = self.param("lora_b", nn.initializers.zeros, (rank, self.features))
        if self.lora.dropout:
            x = dropout(x, self.lora.dropout, fold_in(keys_B, 8 + LORA_TARGETS.index(str(self.name))))
        adapted = plain_product(plain_product(x, a_DR, self.dtype), b_RF, self.dtype)
        return y + (adapted * (self.lora.alpha / rank)).reshape(y.shape)


def linear(config: ModelConfig, name: str, features: int, residual: bool = False) -> Linear:
    """The linear layer `name` of a block (one of LORA_TARGETS), with the bias and adapters that `config` asks for.

    The two layers of a block that write to the residual stream have a smaller init_std in deeper models (GPT-2).
    """
    init_std = INIT_STD / float(np.sqrt(2 * config.n_layer)) if residual else INIT_STD
    has_bias = config.has_bias(name if name in ("qkv", "out") else "mlp")
    if config.lora.rank and name in config.lora.targets:
        return AdaptedLinear(features, has_bias, init_std, config.dtype, config.lora, name=name)
    return Linear(features, has_bias, init_std, config.dtype, name=name)


def symmetric_uniform(limit: float) -> nn.initializers.Initializer:
    """Initialises parameters uniformly between -limit and limit."""
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -limit, limit)


def split(params: Any) -> tuple[Any, Any]:
    """The adapters and the other parameters, as two trees without empty branches."""
    adapters: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            for tree, branch in zip((adapters, rest), split(value), strict=True):
                tree |= {name: branch} if branch else {}
        else:
            (adapters if name in ADAPTERS else rest)[name] = value
    return adapters, rest


def join(first: Any, second: Any) -> Any:
    """One tree with the leaves of both. Raises ValueError when they have one in common."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise ValueError("both trees have the same leaf")
    shared = {name: join(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **shared}


def fold(params: Any, lora: LoraConfig) -> Any:
    """The parameters without adapters, each of which is folded into its matrix: kernel + alpha / rank * a @ b."""
    if not isinstance(params, dict):
        return params
    folded = {name: fold(value, lora) for name, value in params.items() if name not in ADAPTERS}
    if "lora_a" in params:
        scale = lora.alpha / lora.rank
        folded["kernel"] = params["kernel"] + scale * jnp.matmul(
            params["lora_a"], params["lora_b"], precision="highest"
        )
    return folded
