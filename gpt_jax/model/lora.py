"""Adapters (Hu et al. 2022): the product that they add to a linear layer, and their place in the parameter tree.

Those of one run are trained by `AdaptedLinear`, and folded into the matrices for use. Those of several runs are joined
to `Adapters`, beside the matrices, of which each row of a batch has its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

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


class Adapters(NamedTuple):
    """The adapters of several runs on one model, joined along their ranks, R in all: float32 NumPy arrays.

    layers: for each layer, a tree like that of its parameters, which has `lora_a_RD` and `lora_b_FR`, as kernels are
    laid out for decoding, in each linear layer that a run adapts. They are 0 in the ranks of the others. scales_AR:
    row i has alpha / rank in the ranks of the i-th run, counted from 1, and 0 elsewhere; row 0 is the model without
    adapters.
    """

    layers: tuple[Any, ...]
    scales_AR: np.ndarray

    @property
    def n(self) -> int:
        """The number of runs."""
        return len(self.scales_AR) - 1


def joined(runs: Sequence[tuple[Any, LoraConfig]]) -> Adapters:
    """The adapters of runs on one model, each a tree of the adapters alone, see `split`, with their configuration."""
    R = sum(lora.rank for _, lora in runs)
    scales_AR = np.zeros((1 + len(runs), R), np.float32)
    leaves: dict[tuple[str, ...], np.ndarray] = {}  # With axes L, R, and D or F.
    first = 0
    for number, (params, lora) in enumerate(runs, 1):
        own = slice(first, first + lora.rank)
        scales_AR[number, own] = lora.alpha / lora.rank
        for path, leaf in flatten_dict(params["layers"]).items():
            values = np.swapaxes(leaf, 1, 2) if path[-1] == "lora_a" else np.asarray(leaf)
            whole = leaves.setdefault(path, np.zeros((len(values), R, values.shape[2]), np.float32))
            whole[:, own] = values
        first += lora.rank

    def layer(i: int) -> Any:
        a_RD = {(*path[:-1], "lora_a_RD"): x[i] for path, x in leaves.items() if path[-1] == "lora_a"}
        b_FR = {(*path[:-1], "lora_b_FR"): x[i].T for path, x in leaves.items() if path[-1] == "lora_b"}
        return unflatten_dict(a_RD | b_FR)

    return Adapters(tuple(map(layer, range(len(next(iter(leaves.values())))))), scales_AR)


def for_rows(params: Any, scales_BR: jax.Array) -> Any:
    """The parameters of a layer for rows with these scales of adapters, which stand beside the adapters."""
    if not isinstance(params, dict):
        return params
    layer = {name: for_rows(value, scales_BR) for name, value in params.items()}
    return {**layer, "scales_BR": scales_BR} if "lora_a_RD" in layer else layer
