"""Divides arrays over a mesh of devices, data x fsdp x context x tensor, by the letters of their dimensions.

The sequences of a batch are divided over data and fsdp, and each sequence over context, whose devices gather the keys
and values of the whole sequence (Llama Team 2024, The Llama 3 Herd of Models, section 3.3.2). Parameters are stored
divided over fsdp and context (Rajbhandari et al. 2020, ZeRO stage 3) and tensor, and gathered over the first two for
use. The tensor axis divides heads, feed-forward and vocabulary, in use as well (Shoeybi et al. 2019, Megatron-LM). XLA
derives everything else, the collectives included, from these few rules.

Without a mesh, on one device and under pmap, the functions on arrays do nothing.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from gpt_jax.config import ModelConfig

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
TOKEN_AXES = (*BATCH_AXES, "context")
GATHERED_AXES = ("fsdp", "context")

STORED = {"D": GATHERED_AXES, "H": "tensor", "F": "tensor", "V": "tensor"}
"""The mesh axes that divide each dimension of a stored parameter; H stands for whole heads, of any width."""

ACTIVE = {"B": BATCH_AXES, "T": "context", "H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}
"""The same for parameters in use and for activations. S, the keys of whole sequences, is not divided."""

LINEAR = {"qkv": ("D", "H"), "out": ("H", "D"), "gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D")}
"""The input and output dimension of each linear layer."""

DIMENSIONS = {"tokens_VD": "VD", "head_VD": "VD", "positions_TD": "SD"}  # Positions are gathered whole, then sliced.
for _name, (_from, _to) in LINEAR.items():
    DIMENSIONS |= {f"{_name}/kernel": _from + _to, f"{_name}/kernel_FD": _to + _from}
    DIMENSIONS |= {f"{_name}/lora_a": _from + "R", f"{_name}/lora_b": "R" + _to}
    DIMENSIONS |= {f"{_name}/bias": _to} if _to != "D" else {}


def dimensions(path: tuple[Any, ...]) -> str | None:
    """The letters of a parameter's dimensions, by the end of its path in the tree. None for parameters that every
    device holds whole: the scales of norms, and other vectors as wide as the model, which are not worth gathering. The
    optimizer's moments end in their parameter's path, and are divided as it is."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return DIMENSIONS.get(names[-1]) or DIMENSIONS.get("/".join(names[-2:]))


def spec(dims: str, axes: dict[str, Any], ndim: int) -> PartitionSpec:
    """The axes of an array whose last dimensions are `dims`; leading ones, such as L, are not divided."""
    return PartitionSpec(*[None] * (ndim - len(dims)), *(axes.get(letter) for letter in dims))


def stored_spec(path: tuple[Any, ...], x: Any) -> PartitionSpec:
    """The axes of a stored leaf in a tree of parameters, or in another tree with their paths."""
    dims = dimensions(path)
    return PartitionSpec() if dims is None else spec(dims, STORED, x.ndim)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each stored leaf in a tree of parameters, or in another tree with their paths."""
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, stored_spec(path, x)), tree)


def indivisible(config: ModelConfig, fsdp: int, context: int, tensor: int) -> str | None:
    """A message that names the first dimension of a model that does not divide over a mesh, such as "model.d_model, 5,
    does not divide over parallel.fsdp = 2"; None when all do."""
    sizes = {
        "model.d_model": (config.d_model, "fsdp x context" if context > 1 else "fsdp", fsdp * context),
        "model.context_length": (config.context_length, "context", context),
        "the number of key/value heads": (config.kv_heads, "tensor", tensor),
        "the feed-forward width": (config.ff_dim, "tensor", tensor),
        "the vocabulary": (config.embedding_rows, "tensor", tensor),
    }
    for name, (size, axis, n) in sizes.items():
        if size % n:
            hint = "; train with model.vocab_multiple = 128" if name == "the vocabulary" else ""
            return f"{name}, {size}, does not divide over parallel.{axis} = {n}{hint}"
    return None


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are divided over; None on one device."""
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES else None


def mesh_is_set() -> bool:
    """True when the program that is being traced will run on a mesh whose arrays XLA divides."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == MESH_AXES and set(mesh.axis_types) == {AxisType.Auto}


def context_parts() -> int:
    """The number of devices that each sequence is divided over."""
    return n_parts("context")


def n_parts(axes: str | tuple[str, ...]) -> int:
    """The number of parts that these axes of the mesh divide a dimension into; 1 without a mesh."""
    names = (axes,) if isinstance(axes, str) else axes
    return prod(jax.sharding.get_abstract_mesh().shape[name] for name in names) if mesh_is_set() else 1


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """`x`, an activation whose last dimensions are `dims`, divided as in ACTIVE; those without an axis are whole, and
    so are sequences that do not divide, such as a prompt that is read alone."""
    if not mesh_is_set():
        return x
    if dims[0] == "B" and x.shape[-len(dims)] % n_parts(BATCH_AXES):
        dims = f"_{dims[1:]}"
    return jax.lax.with_sharding_constraint(x, spec(dims, ACTIVE, x.ndim))


def divide(tree: Any, axes: PartitionSpec) -> Any:
    """Arrays, divided over these axes of the mesh."""
    return jax.lax.with_sharding_constraint(tree, axes) if mesh_is_set() else tree


def in_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` as each device calls it with its parts of the arguments; without a mesh, as it is. The parts of what
    it returns are alike on devices between which nothing is divided."""
    if not mesh_is_set():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_major(x: jax.Array, dims: str) -> jax.Array:
    """`x`, an activation, with its last dimension contiguous in memory, and its gradient likewise.

    XLA chooses the layout of arrays by what reads them, and hands the choice on. Where a gradient is summed over B, it
    takes B as contiguous on GPUs, and then throughout the model: a fifth of a step of GPT-2 went into transpositions.
    """

    def constrain_layout(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    if not mesh_is_set():
        return constrain_layout(x)
    axes = spec(dims, ACTIVE, x.ndim)  # XLA would gather what is to have a layout.
    return jax.shard_map(constrain_layout, in_specs=axes, out_specs=axes)(x)


def for_use(params: Any, dtype: DTypeLike) -> Any:
    """Parameters for use: gathered over fsdp and context, matrices in the compute dtype, so that half the bytes
    travel. Without a mesh, they stay as they are."""
    if not mesh_is_set():
        return params

    def use(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        dims = dimensions(path)
        if dims is None:
            return x
        return jax.lax.with_sharding_constraint(x.astype(dtype), spec(dims, ACTIVE, x.ndim))

    return jax.tree_util.tree_map_with_path(use, params)


def to_storage(tree: Any) -> Any:
    """Parameters, or a tree with their paths such as the gradients, divided as parameters are stored."""
    if not mesh_is_set():
        return tree

    def divide(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, stored_spec(path, x))

    return jax.tree_util.tree_map_with_path(divide, tree)


def gathers_again() -> bool:
    """True when parameters are gathered for use, so that gathering them again saves memory."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh_is_set() and any(mesh.shape[axis] > 1 for axis in GATHERED_AXES)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of jax.checkpoint that keeps all but gathered parameters, keys and values, and copies of them in another
    dtype or order. The backward pass gathers these again: those of all layers together would be the whole model, and
    the keys and values of whole sequences."""
    return primitive.name not in ("sharding_constraint", "convert_element_type", "all_gather", "transpose")


def on_each_device(attend: Callable[..., jax.Array], *more_specs: Any) -> Callable[..., jax.Array]:
    """`attend(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, *more)` as a function of the same without segments_BS.
    Each device calls it with its own sequences, queries and heads, and all keys of these sequences, since XLA cannot
    look into kernels to divide them. The segments, of queries and of keys, may be None."""
    divides = context_parts() > 1

    def gathered(x: jax.Array) -> jax.Array:
        # Gathered here, since the transpose of all_gather is a reduce-scatter. The gradients of an array that enters
        # whole would be summed whole.
        return jax.lax.all_gather(x, "context", axis=1, tiled=True) if divides else x

    def on_one_device(
        q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None, *more: Any
    ) -> jax.Array:
        k_BSGK, v_BSGK, segments_BS = jax.tree.map(gathered, (k_BTGK, v_BTGK, segments_BT))
        return attend(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, *more)

    if not mesh_is_set():
        return on_one_device
    tokens = PartitionSpec(BATCH_AXES, "context")
    heads = PartitionSpec(BATCH_AXES, "context", "tensor", None)
    in_specs = (heads, heads, heads, tokens, *more_specs)
    return jax.shard_map(on_one_device, in_specs=in_specs, out_specs=heads, check_vma=False)
