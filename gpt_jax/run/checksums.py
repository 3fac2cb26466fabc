"""Checksums of arrays, by which a changed byte is noticed: of arrays on devices, and of arrays read part by part."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.interop.layout import ReadPart, n_parts

SLICE_ELEMENTS = 1 << 18
"""Elements that NumPy hashes at one time: their hashes, 1 MB, stay in a core's cache."""


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """The uint32 checksum of an array: the sum of a hash of each element's bits and index. An element of 64 bits counts
    as two, smaller ones are filled up with zeros.

    Integer sums are exact in any order, so the sharding does not matter, and parts can be summed one after the other.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4) * 8
    x = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    # The flat index of each element, by dimension: flattening an array that is sharded would gather it.
    strides = [math.prod(x.shape[i + 1 :]) & 0xFFFFFFFF for i in range(x.ndim)]
    indices = sum((jax.lax.broadcasted_iota(jnp.uint32, x.shape, i) * jnp.uint32(s) for i, s in enumerate(strides)))
    return jnp.sum(hashes(x, jnp.uint32(indices)), dtype=jnp.uint32)


def hashes(bits: Any, indices: Any) -> Any:
    """The hash of each element, from its bits and its flat index, uint32 all, in NumPy or JAX.

    It is MurmurHash3's 32-bit finaliser, a bijection: a change of one element is always detected, other changes are
    missed once in four billion times.
    """
    h = bits + indices * np.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def part_checksum(part: np.ndarray, first: int) -> int:
    """What a part of a float32 array adds to its checksum. first: the flat index of the part's first element."""
    bits, total = part.reshape(-1).view(np.uint32), 0
    for i in range(0, bits.size, SLICE_ELEMENTS):
        piece = bits[i : i + SLICE_ELEMENTS]
        indices = np.arange(first + i, first + i + piece.size).astype(np.uint32)  # Modulo 2**32, as on devices.
        total += int(hashes(piece, indices).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF


def named_checksums(tree: Any) -> dict[str, int]:
    """The checksum of each leaf by its path, such as "layers/mlp/up/kernel". Each leaf is a program of its own: in one
    program for all, XLA:CPU would keep all hashes at once, as many bytes as the leaves."""
    return {name: int(checksum(leaf)) for name, leaf in zip(leaf_shapes(tree), jax.tree.leaves(tree), strict=True)}


def named_checksums_of_parts(read: ReadPart, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """`named_checksums` of a tree that is read part by part. shapes: those of its leaves."""
    sums = {}
    for leaf, shape in shapes.items():
        n = n_parts(leaf, shape)
        size = math.prod(shape) // n
        sums[leaf] = sum(part_checksum(read(leaf, i), i * size) for i in range(n)) & 0xFFFFFFFF
    return sums


def tree_fingerprint(tree: Any) -> str:
    """A hash of the names and values of all leaves, in hexadecimal."""
    return fingerprint(named_checksums(tree))


def fingerprint(checksums: dict[str, int]) -> str:
    """A hash of the names and checksums of leaves, in hexadecimal."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
