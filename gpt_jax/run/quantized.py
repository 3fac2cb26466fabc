"""Parameters in int8 for sampling and evaluation: made from a source part by part, and kept for the next start.

Matrices, embeddings and the head are quantised symmetrically, with one scale an output channel: each row of a kernel
(F, D), and each token's row of the embeddings, is scale * q with whole numbers q of -127 to 127. Biases, norms and
learned positions stay as they are.
"""

import contextlib
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.layout import ReadPart, is_stacked
from gpt_jax.interop.load import part_shapes
from gpt_jax.model.gpt import Params
from gpt_jax.model.weight import scale_of
from gpt_jax.storage.files import locked, replacing
from gpt_jax.system import cache_folder

VERSION = 1
"""Of what is kept. Files of other versions are not read."""

MOST_KEPT = 4
"""Models whose parameters are kept; the one that was used longest ago goes first."""

MATRICES = ("kernel", "tokens_VD", "head_VD")


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix (F, D) as int8 (F, D), and a float32 scale for each row (F,), so that scale * int8 is the matrix
    but for half a scale. The largest number of a row is +-127, and a row of zeros has a scale of 1."""
    scale = np.max(np.abs(matrix), axis=1) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return np.rint(matrix / scale[:, None]).astype(np.int8), scale


def load_quantized(open_parts: Callable[[], ReadPart], config: ModelConfig, kept: Path | None) -> Params:
    """The parameters of `config` in int8, as NumPy arrays in the form that `prepare_params` gives. Memory holds one
    part in float32 at a time.

    open_parts: opens what they are made of. kept: the file in which they are, or are put; None: nowhere. A file that is
    damaged is made anew.
    """
    if kept and (tensors := read_kept(kept)) is not None:
        return tree_of(tensors)
    tensors = dict(quantized(open_parts(), config))
    if kept:
        keep(kept, tensors)
    return tree_of(tensors)


def quantized(read: ReadPart, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays and their names, such as layers/0/attention/qkv/kernel_FD."""
    for leaf in part_shapes(config):
        for i in range(config.n_layer if is_stacked(leaf) else 1):
            part = read(leaf, i)
            path = leaf.replace("layers/", f"layers/{i}/", 1)
            parent, _, name = path.rpartition("/")
            if name not in MATRICES:
                yield path, part
                continue
            name, matrix = ("kernel_FD", part.T) if name == "kernel" else (name, part)
            folder = f"{parent}/" if parent else ""
            values, scale = quantize(np.ascontiguousarray(matrix))
            yield folder + name, values
            yield folder + scale_of(name), scale


def tree_of(tensors: Mapping[str, np.ndarray]) -> Params:
    """The tree of arrays with such names, in which the layers are a tuple."""
    tree: dict[str, Any] = {}
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = tensor
    return {**tree, "layers": tuple(tree["layers"][str(i)] for i in range(len(tree["layers"])))}


def kept_file(identity: str, config: ModelConfig) -> Path | None:
    """The file for a model of that identity, see `Source`, and configuration; None for a user without a home folder."""
    facts = [VERSION, identity, config.context_length, config.embedding_rows]
    try:
        return cache_folder() / "int8" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.npz"
    except OSError:
        return None


def read_kept(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None when there is none, or it is damaged, which its checksums tell."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            tensors = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    with contextlib.suppress(OSError):  # A cache may be for reading alone.
        file.touch()  # It was used now.
    return tensors


def keep(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, and removes files that were not used for long. A user is told when that cannot be done. While
    another process does it, which may be for the same model, nothing is written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        with contextlib.suppress(UserError), locked(file.parent / ".lock", "another process writes"):
            with replacing(file) as temporary, temporary.open("wb") as out:
                np.savez(out, allow_pickle=False, **tensors)
            by_use = sorted(file.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime)
            for old in by_use[:-MOST_KEPT]:
                old.unlink(missing_ok=True)
    except OSError as e:
        print(f"the int8 parameters are not kept for the next start: {e.filename}: {e.strerror}", file=sys.stderr)


def state_of_files(path: Path) -> list[Any]:
    """What tells the files of a model from other ones without reading them: names, sizes and times of change."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [str(path.absolute()), *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files)]
