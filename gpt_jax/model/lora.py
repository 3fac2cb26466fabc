"""Adapters in the parameter tree (Hu et al. 2022): telling them from the rest, and folding them into the matrices."""

from typing import Any

import jax.numpy as jnp

from gpt_jax.config import LoraConfig

ADAPTERS = ("lora_a", "lora_b")


def split(params: Any) -> tuple[Any, Any]:
    """The adapters, and everything else, each in a tree of its own; branches that would be empty are left out."""
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
    """One tree with the leaves of both, which have none in common."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise ValueError("both trees have the same leaf")
    shared = {name: join(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **shared}


def fold(params: Any, lora: LoraConfig) -> Any:
    """The parameters without adapters, of which each is added to its matrix: kernel + alpha / rank * a @ b."""
    if not isinstance(params, dict):
        return params
    folded = {name: fold(value, lora) for name, value in params.items() if name not in ADAPTERS}
    if "lora_a" in params:
        scale = lora.alpha / lora.rank
        folded["kernel"] = params["kernel"] + scale * jnp.matmul(
            params["lora_a"], params["lora_b"], precision="highest"
        )
    return folded
