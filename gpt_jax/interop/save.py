"""Saving a model of ours as one of a published family, with the tensors and settings of transformers."""

import dataclasses
import functools
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import ModelConfig, StoredDType
from gpt_jax.errors import UserError
from gpt_jax.interop.families import FAMILIES, family_for
from gpt_jax.interop.families.family import Family
from gpt_jax.interop.layout import ReadPart, is_stacked
from gpt_jax.interop.load import leaf_name, part_shapes, tensor_shapes
from gpt_jax.interop.weights import write_safetensors
from gpt_jax.model.gpt import Params
from gpt_jax.tokenizer.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # As transformers has it.


def in_a_family(config: ModelConfig, read: ReadPart) -> tuple[ModelConfig, ReadPart, Family]:
    """The model as one of a family that computes the same, and the family. Biases that the family requires become 0.

    Raises UserError when there is no such family.
    """
    family = family_for(config)
    if family is None and not config.bias:
        with_biases = dataclasses.replace(config, bias=True)
        family = family_for(with_biases)
        if family:
            config, read = with_biases, filled_up(read, part_shapes(config), part_shapes(with_biases))
    if family is None:
        raise UserError(
            "transformers has no model that computes what this one does; what can be exported are the architectures of "
            f"{', '.join(FAMILIES)}"
        )
    return config, read, family


def filled_up(read: ReadPart, own: Container[str], shapes: Mapping[str, tuple[int, ...]]) -> ReadPart:
    """`read` with zeros for the leaves that are not the model's own. shapes: those of a part of each leaf."""
    return lambda leaf, i: read(leaf, i) if leaf in own else np.zeros(shapes[leaf], np.float32)


def write_model(folder: Path, family: Family, config: ModelConfig, read: ReadPart, dtype: StoredDType) -> None:
    """Writes the tensors one by one. A part of the parameters is read when its first tensor is written, and forgotten
    after its last one."""
    places: dict[str, tuple[str, int, int]] = {}  # By tensor: leaf, layer, number in the layout.
    for leaf in part_shapes(config):
        layout = family.tensors[leaf]
        for i in range(config.n_layer if is_stacked(leaf) else 1):
            places |= {name.format(i=i): (leaf, i, k) for k, name in enumerate(layout.names)}
    read_once = functools.lru_cache(maxsize=1)(read)  # The tensors of a part follow each other.

    def read_tensor(name: str) -> np.ndarray:
        leaf, i, k = places[name]
        return np.ascontiguousarray(family.tensors[leaf].write(read_once(leaf, i), config)[k])

    write_safetensors(folder, tensor_shapes(family, config), read_tensor, dtype, MAX_SHARD_BYTES)


def parts_of(params: Params) -> ReadPart:
    """The parts of parameters in memory."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return lambda leaf, i: np.asarray(leaves[leaf][i] if is_stacked(leaf) else leaves[leaf])


def model_settings(family: Family, config: ModelConfig, tokenizer: Tokenizer, dtype: StoredDType) -> dict[str, Any]:
    """The content of config.json."""
    settings = family.to_settings(config) | generation_settings(tokenizer)
    if family.model_type == "gpt2":
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    return settings | {"dtype": dtype, "torch_dtype": dtype, "use_cache": True}


def generation_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json: the tokens that begin, end and pad a text."""
    stops = sorted(tokenizer.stop_ids)
    begin = tokenizer.begin_of_text
    return {
        "bos_token_id": tokenizer.end_of_text if begin is None else begin,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.end_of_text,
    }
