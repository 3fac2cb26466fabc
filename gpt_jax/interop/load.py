"""Loading a published model as one of ours: its configuration, and its parameters, read tensor by tensor."""

import dataclasses
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import LoraConfig, ModelConfig, check
from gpt_jax.errors import UserError
from gpt_jax.interop.families import family_of
from gpt_jax.interop.families.family import Family
from gpt_jax.interop.gguf_file import GGUFFile
from gpt_jax.interop.hub import find_model
from gpt_jax.interop.layout import ReadPart, is_stacked, n_parts
from gpt_jax.interop.model_files import ModelFiles, open_model
from gpt_jax.interop.weights import few
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.storage.remote import is_remote
from gpt_jax.tokenizer.published import gguf_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer

PADDED_TO = 128  # Embedding rows are padded to a multiple of this, which suits matrix units.
ALIGNMENT = 64  # Bytes. XLA:CPU uses arrays that begin at a multiple of it without copying them.


def open_named(name: str) -> ModelFiles:
    """The files of a model: a folder, a .gguf file, or a name on the hub."""
    return open_model(find_model(name))


def named_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of a .gguf file, or of a model on the hub. None if `name` is another file or folder, or a kind of
    tokenizer to make.

    Raises UserError when there is no such model.
    """
    if name.endswith(".gguf") and Path(name).is_file():
        return gguf_tokenizer(GGUFFile(Path(name)).fields)  # The file may hold a vocabulary alone.
    if name not in ("sentencepiece", "bytes") and not is_remote(name) and not Path(name).exists():
        return open_named(name).tokenizer()
    return None


def their_config(files: ModelFiles) -> ModelConfig:
    """The configuration of a published model, with its own context. Raises UserError when it is not supported."""
    family, shapes = family_of(files.config, files.where), files.weights.shapes

    # A configuration of a few bytes may claim any number of layers, and any width, that would take all memory to count.
    def check_claim(ours: str, claimed: Any, most: int, has: str) -> None:
        if isinstance(claimed, int) and claimed > most:
            raise UserError(f"{files.where}: {family.named(ours)} = {claimed}, but {has}")

    layers = {match[1] for name in shapes if (match := re.search(r"\.(\d+)\.", name))}
    claimed = family.value(files.config, "n_layer")
    check_claim("n_layer", claimed, len(layers), f"the tensors there are of {len(layers)} layers")
    config = family.to_config(files.config, files.where)
    most = max(map(prod, shapes.values()), default=0)
    for name in ("vocab_size", "d_model", "n_head", "d_head", "d_ff"):
        check_claim(name, getattr(config, name), most, f"no tensor there has more than {most} numbers")
    check(config.vocab_size > 0, f"{files.where}: {family.named('vocab_size')}", config.vocab_size, "1 or more")
    return config


def check_architecture(config: ModelConfig, theirs: ModelConfig, where: str) -> None:
    """Raises UserError naming what differs, unless `config` has the published architecture. The context may differ."""
    ours = dataclasses.replace(config, context_length=theirs.context_length)
    published = dataclasses.asdict(theirs.architecture())
    different = [
        f"model.{name} is {published[name]} there and {value} here"
        for name, value in dataclasses.asdict(ours.architecture()).items()
        if value != published[name]
    ]
    if different:
        raise UserError(f"the model in {where} is not that of the configuration: {'; '.join(different)}")


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raises UserError when the tokenizer has ids that the model does not know, and that a text can need.

    Special tokens that were added later, such as Gemma 3's for images or a [PAD], may lack a row of the embeddings: no
    text yields them, and they are never drawn.
    """
    surplus = set(range(config.vocab_size, tokenizer.vocab_size))
    spare = set(tokenizer.special_tokens.values()) - {tokenizer.begin_of_text, tokenizer.end_of_text}
    if not surplus <= spare:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens and the model only {config.vocab_size}; "
            "they do not belong together"
        )


def load_params(files: ModelFiles, config: ModelConfig, shardings: Callable[[Params], Any]) -> Params:
    """The parameters of a published model, float32, without the adapters of `config`.

    shardings: gives a sharding for each leaf of a tree of shapes, by which the parameters are placed. Tensors are read
    one by one into their leaf, so the host holds at most one leaf besides those that are placed already. Raises
    UserError, before anything is allocated, when the tensors do not fit the model's config.json.
    """
    fill = part_filler(files, config)

    def load(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        leaf = leaf_name(path)
        out = aligned(shape.shape)
        for i in range(n_parts(leaf, out.shape)):
            fill(out[i] if is_stacked(leaf) else out, leaf, i)
        if sharding.is_fully_addressable:
            return jax.device_put(out, sharding)
        return jax.make_array_from_callback(out.shape, sharding, lambda index: out[index])  # This host's parts.

    shapes = param_shapes(dataclasses.replace(config, lora=LoraConfig()))
    return jax.tree_util.tree_map_with_path(load, shapes, shardings(shapes))


def open_parts(files: ModelFiles, config: ModelConfig) -> ReadPart:
    """The parameters that `load_params` loads, to be read part by part. Raises UserError as it does, and so does the
    reader."""
    fill, shapes = part_filler(files, config), part_shapes(dataclasses.replace(config, lora=LoraConfig()))

    def read_part(leaf: str, i: int) -> np.ndarray:
        out = np.empty(shapes[leaf], np.float32)
        fill(out, leaf, i)
        return out

    return read_part


def part_filler(files: ModelFiles, config: ModelConfig) -> Callable[[np.ndarray, str, int], None]:
    """A function `fill(out, leaf, i)` that reads a part of the parameters, see `ReadPart`, into `out`.

    Raises UserError when the tensors do not fit the model's config.json, or that is not of the model in `config`.
    """
    family, theirs = family_of(files.config, files.where), their_config(files)
    file_names = check_tensors(files, family, theirs)
    check_architecture(config, theirs, files.where)

    def fill(out: np.ndarray, leaf: str, i: int) -> None:
        def read(name: str, out: np.ndarray | None = None) -> np.ndarray:
            return files.weights.read(file_names[name.format(i=i)], out)

        family.tensors[leaf].fill(out, read, config)

    return fill


def param_shapes(config: ModelConfig) -> Params:
    """The shapes of a model's parameters, found with one layer, because a file may ask for any number of them."""
    one_layer = dataclasses.replace(config, n_layer=1, dtype="float32")  # Any dtype will do: parameters are float32.
    shapes = jax.eval_shape(lambda: init_params(GPT(one_layer), jax.random.key(0)))
    layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.n_layer, *x.shape[1:]), x.dtype), shapes["layers"])
    return {**shapes, "layers": layers}


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of the parameter tree, such as layers/attention/qkv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of a part of each leaf, see `ReadPart`, by the leaf's name."""
    leaves = {leaf_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    return {leaf: shape[1:] if is_stacked(leaf) else shape for leaf, shape in leaves.items()}


def tensor_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model, as the family has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, shape in part_shapes(config).items():
        layout = family.tensors[leaf]
        part = jax.ShapeDtypeStruct(shape, np.float32)
        tensors = jax.eval_shape(lambda x, layout=layout: layout.write(x, config), part)
        for i in range(config.n_layer if is_stacked(leaf) else 1):
            shapes |= {name.format(i=i): tensor.shape for name, tensor in zip(layout.names, tensors, strict=True)}
    return shapes


def name_in_files(files: ModelFiles, family: Family, name: str) -> str:
    """The name that a tensor of the family has in the files, which may leave out the prefix, as OpenAI's GPT-2 does."""
    short = name.removeprefix(family.prefix)
    return short if name not in files.weights.shapes and short in files.weights.shapes else name


def check_tensors(files: ModelFiles, family: Family, config: ModelConfig) -> dict[str, str]:
    """The names that the tensors of the model have in the files, by their names in the family.

    Raises UserError naming tensors that are missing, unknown, or of another shape than config.json asks for.
    """
    expected, found = tensor_shapes(family, config), files.weights.shapes
    names = {name: name_in_files(files, family, name) for name in expected}
    not_weights = list(family.not_weights)
    if config.tied_head:  # Either name will do. With both, they have the same values.
        embeddings, head = (family.tensors[leaf].names[0] for leaf in ("tokens_VD", "head_VD"))
        if names[embeddings] not in found and head in found:
            names[embeddings] = head
        not_weights.append(re.escape(head))
    ignored = re.compile("|".join(not_weights) or r"(?!)")
    problems = {
        "missing": [name for name in names.values() if name not in found],
        "not known": [name for name in found if name not in names.values() and not ignored.fullmatch(name)],
        "of another shape": [
            f"{names[name]} {found[names[name]]}, not {shape}"
            for name, shape in expected.items()
            if found.get(names[name], shape) != shape
        ],
    }
    listing = "; ".join(f"{problem}: {few(listed)}" for problem, listed in problems.items() if listed)
    if listing:
        raise UserError(f"the tensors in {files.where} do not fit its configuration: {listing}")
    return names


def check_files(files: ModelFiles) -> None:
    """Raises UserError unless the tensors are those that the model's configuration asks for."""
    check_tensors(files, family_of(files.config, files.where), their_config(files))


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised float32 array, aligned so that XLA:CPU uses it without a copy."""
    n_bytes = 4 * int(np.prod(shape))
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes].view(np.float32).reshape(shape)
