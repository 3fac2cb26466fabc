"""The arrays of a checkpoint, read part by part: without a device, and in the memory of a part.

orbax restores whole arrays. It writes each as a zarr array in one OCDBT store, which tensorstore reads chunk by chunk.
"""

import itertools
from math import prod
from typing import Any

import numpy as np
import tensorstore

from gpt_jax.interop.layout import is_stacked
from gpt_jax.run.object_storage import kvstore
from gpt_jax.storage.remote import AnyPath

MOST_BYTES = 2**30
"""Bytes of layers that are read together where chunks span them, as in checkpoints of earlier versions: a chunk is
always read whole, so that with one layer at a time, all would be read as often as there are layers."""


class StoredArrays:
    """The arrays in the folder of a checkpoint's item, as a `ReadPart`. It raises what tensorstore raises."""

    def __init__(self, folder: AnyPath) -> None:
        self.base = kvstore(folder)
        self.opened: dict[str, Any] = {}
        self.leaf, self.first, self.layers = "", 0, np.empty(0, np.float32)  # The layers that were read last.

    def __call__(self, leaf: str, i: int) -> np.ndarray:
        if leaf not in self.opened:
            self.opened[leaf] = self.open(leaf)
        stored = self.opened[leaf]
        if not is_stacked(leaf):
            return read(stored, 0, stored.shape[0])
        if leaf != self.leaf or not self.first <= i < self.first + len(self.layers):
            self.layers = np.empty(0, np.float32)  # Their memory is free before the next ones are read.
            n = layers_at_once(stored)
            self.leaf, self.first = leaf, i // n * n
            self.layers = read(stored, self.first, min(self.first + n, stored.shape[0]))
        return self.layers[i - self.first]

    def open(self, leaf: str) -> Any:
        """The stored array of a leaf. Only its metadata are read."""
        store = {"driver": "ocdbt", "base": self.base, "path": f"{leaf.replace('/', '.')}/"}
        return tensorstore.open({"driver": "auto", "kvstore": store}, read=True).result()


def layers_at_once(stored: Any) -> int:
    """The number of layers of a stacked array that are best read together: those of a chunk, if memory has room."""
    return max(1, min(stored.chunk_layout.read_chunk.shape[0], MOST_BYTES // (4 * prod(stored.shape[1:]))))


def read(stored: Any, start: int, stop: int) -> np.ndarray:
    """Rows of a stored array, float32, one chunk after the other: if all were asked for at the same time, memory would
    hold them twice, as they are stored, too."""
    out = np.empty((stop - start, *stored.shape[1:]), np.float32)
    bounds, sizes = [(start, stop), *((0, n) for n in stored.shape[1:])], stored.chunk_layout.read_chunk.shape
    along = [
        [slice(i, min(i + size, end)) for i in range(begin, end, size)]
        for (begin, end), size in zip(bounds, sizes, strict=True)
    ]
    for rows, *others in itertools.product(*along):
        out[(slice(rows.start - start, rows.stop - start), *others)] = stored[(rows, *others)].read().result()
    return out
