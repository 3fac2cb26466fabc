"""How a family lays out its tensors: conversion between a leaf of our parameter tree and the tensors that make it up.

`write` works on arrays of NumPy and of JAX, so under jax.eval_shape it also gives the shapes expected in a file. If a
leaf belongs to a layer, names have the layer's number at `{i}`, and the arrays are one layer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpt_jax.config import ModelConfig

Read = Callable[..., np.ndarray]
"""`read(name)` gives a tensor as float32; `read(name, out)` reads it into an array of its shape, of any strides."""

ReadPart = Callable[[str, int], np.ndarray]
"""`read_part(leaf, i)` gives a part of a parameter tree, float32: layer i of a stacked leaf, or with 0 another leaf. A
leaf has a name such as layers/attention/qkv/kernel."""


def n_parts(leaf: str, shape: tuple[int, ...]) -> int:
    """The number of parts of a leaf of this shape: its layers if it is stacked, or else one."""
    return shape[0] if is_stacked(leaf) else 1


def is_stacked(leaf: str) -> bool:
    """True when the first axis of a leaf counts layers."""
    return leaf.startswith("layers/")


class Layout(Protocol):
    """The connection between one leaf and one tensor or more."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """Fills the leaf `out` from the tensors."""

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """The tensors that the leaf stands for, as views of it."""


@dataclass(frozen=True)
class Same:
    """A tensor that equals the leaf."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """See Layout."""
        return (self.name,)

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        read(self.name, out)

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return (leaf,)


@dataclass(frozen=True)
class Positions(Same):
    """One row per position. Rows beyond the context are left out."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        out[...] = read(self.name)[: len(out)]


@dataclass(frozen=True)
class Embedding(Same):
    """One row per token. Our rows beyond the vocabulary are padding, and 0."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        read(self.name, out[: config.vocab_size])
        out[config.vocab_size :] = 0

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return (leaf[: config.vocab_size],)


@dataclass(frozen=True)
class Transposed(Same):
    """The kernel of a torch.nn.Linear, which has the outputs first."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        read(self.name, out.T)

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return (leaf.T,)


@dataclass(frozen=True)
class OffsetByOne(Same):
    """A scale that is stored minus 1, as Gemma's are."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        np.add(read(self.name), 1, out=out)

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return (leaf - 1,)


@dataclass(frozen=True)
class Qkv:
    """Kernels or biases of queries, keys and values, each from its own torch.nn.Linear, outputs first."""

    q: str
    k: str
    v: str

    @property
    def names(self) -> tuple[str, ...]:
        """See Layout."""
        return self.q, self.k, self.v

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        for heads, name in zip(by_heads(out, config), self.names, strict=True):
            heads[...] = read(name).reshape(heads.shape)

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return tuple(heads.reshape(-1, *leaf.shape[:-1]) for heads in by_heads(leaf, config))


def by_heads(leaf: Any, config: ModelConfig) -> tuple[Any, Any, Any]:
    """Views of the queries (G, R, K, ...), keys and values (G, K, ...) in a leaf (..., G * (R + 2) * K)."""
    G, K = config.kv_heads, config.head_dim
    R = config.n_head // G
    columns = leaf.T.reshape(G, R + 2, K, *leaf.shape[:-1])
    return columns[:, :R], columns[:, R], columns[:, R + 1]


@dataclass(frozen=True)
class FusedQkv(Same):
    """Queries, keys and values in one matrix or bias, inputs first, in this order: GPT-2's Conv1D."""

    def fill(self, out: np.ndarray, read: Read, config: ModelConfig) -> None:
        """See Layout."""
        heads = self.by_kind(out, config)
        heads[...] = read(self.name).reshape(heads.shape)

    def write(self, leaf: Any, config: ModelConfig) -> tuple[Any, ...]:
        """See Layout."""
        return (self.by_kind(leaf, config).reshape(leaf.shape),)

    def by_kind(self, leaf: Any, config: ModelConfig) -> Any:
        """View (..., 3, H, K) of a leaf (..., H * 3 * K)."""
        return leaf.reshape(*leaf.shape[:-1], config.n_head, 3, config.head_dim).swapaxes(-3, -2)
