"""Arrays of a checkpoint read part by part, however they were cut into chunks when they were written."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gpt_jax.run import checkpoint, checksums, stored
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.run.stored import StoredArrays, layers_at_once

SHAPES = {"layers/mlp/up/kernel": (6, 64, 96), "layers/norm_1/scale": (6, 64), "tokens_VD": (1001, 64)}
FACTS: dict[str, Any] = {"config": {}, "tokenizer": "", "data": ""}


def tree_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf, array in arrays.items():
        *folders, name = leaf.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = jnp.asarray(array)
    return tree


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in SHAPES.items()}


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Saves the arrays as the parameters of a step. Returns their folder."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree_of(arrays), {"count": jnp.int32(1)}, FACTS, None)
    return folder / "1" / "params"


@pytest.mark.parametrize("chunk_bytes", [20_000, 2**23])
@pytest.mark.parametrize("by_layers", [True, False])
@pytest.mark.parametrize("most_bytes", [1, 60_000, 2**30])
def test_parts_are_those_of_the_arrays(
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    chunk_bytes: int,
    by_layers: bool,
    most_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In any order, from a folder of any name. Not by layers: as earlier versions saved them."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(stored, "MOST_BYTES", most_bytes)
    if not by_layers:
        plain = ocp.SaveArgs(chunk_byte_size=chunk_bytes)
        monkeypatch.setattr(ocp, "SaveArgs", lambda **_: dataclasses.replace(plain))
    read = StoredArrays(save(tmp_path / "a %20b#?語", arrays))
    for leaf in ("layers/mlp/up/kernel", "layers/norm_1/scale"):
        for i in (5, 0, 1, 2, 3, 4):
            np.testing.assert_array_equal(read(leaf, i), arrays[leaf][i])
    np.testing.assert_array_equal(read("tokens_VD", 0), arrays["tokens_VD"])
    expected = {1: 1, 60_000: 2, 2**30: 6}[most_bytes] if chunk_bytes == 2**23 or not by_layers else 1
    assert layers_at_once(read.opened["layers/mlp/up/kernel"]) == expected


def test_each_part_is_read_as_often_as_it_is_asked_for(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not all layers for each of them."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 20_000)
    amounts = []
    read_rows = stored.read

    def counted(array: Any, start: int, stop: int) -> np.ndarray:
        rows = read_rows(array, start, stop)
        amounts.append(rows.size)
        return rows

    monkeypatch.setattr(stored, "read", counted)
    read = StoredArrays(save(tmp_path, arrays))
    for leaf, array in arrays.items():
        for i in range(len(array) if leaf.startswith("layers/") else 1):
            read(leaf, i)
    assert sum(amounts) == sum(array.size for array in arrays.values())


def test_checksums_of_parts_are_those_of_the_arrays(
    arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "SLICE_ELEMENTS", 1000)
    by_part = checksums.named_checksums_of_parts(
        lambda leaf, i: arrays[leaf][i] if leaf.startswith("layers/") else arrays[leaf], SHAPES
    )
    assert by_part == checksums.named_checksums(tree_of(arrays))


@pytest.mark.parametrize("first", [2**32 - 100, 2**33 + 5])
def test_the_index_of_an_element_is_counted_modulo_2_to_the_32(first: int, rng: np.random.Generator) -> None:
    """In arrays of more elements, which no test has."""
    part = rng.normal(size=300).astype(np.float32)
    indices = jnp.arange(300, dtype=jnp.uint32) + jnp.uint32(first % 2**32)
    hashes = checksums.hashes(jnp.asarray(part.view(np.uint32)), indices)
    assert checksums.part_checksum(part, first) == int(jnp.sum(hashes, dtype=jnp.uint32))
