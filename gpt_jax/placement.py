"""How the pure steps run on devices: plain jit on one, pmap over several, or jit over a mesh that divides the state.

With pmap's `in_axes=(None, 0)` and `out_axes=None` every device holds the whole state, and the results look like
ordinary arrays: checkpoints, logs and sampling need not know how many devices there are. On a mesh they need not know
either, since sharded arrays look whole, wherever their shards are.

With several hosts, each has some of the devices, and loads the rows of the batch that its devices need.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt_jax.config import ModelConfig, ParallelConfig
from gpt_jax.errors import UserError
from gpt_jax.model import sharding
from gpt_jax.runtime import platform_name

AXIS = "data"


def choose_placement(config: ParallelConfig, model: ModelConfig, devices: Sequence[jax.Device]) -> "Placement":
    """The placement that `config` asks for. Raises UserError when the model or the devices cannot be divided so."""
    return MeshPlacement(devices, config, model) if config.uses_mesh else Placement(devices)


class Placement:
    """The devices of a run, all of one kind, each with the whole state and an equal share of every batch."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.local_indices = [i for i, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        self.local_mesh = Mesh(np.array([self.devices[i] for i in self.local_indices]), (AXIS,))

    @property
    def n_devices(self) -> int:
        """Number of devices, on all hosts."""
        return len(self.devices)

    @property
    def n_shares(self) -> int:
        """Number of equal shares that a batch is divided into."""
        return self.n_devices

    @property
    def context(self) -> int:
        """Number of devices that a sequence is divided over."""
        return int(self.mesh.shape.get("context", 1))

    @property
    def part_of_each(self) -> str:
        """The part of each of its sequences that a device has, for messages; empty for all of it."""
        return f" (1/{self.context} of each)" if self.context > 1 else ""

    @property
    def axis_name(self) -> str | None:
        """The mapped axis that the steps sum over; None when there is none."""
        return AXIS if self.n_devices > 1 else None

    @property
    def must_wait(self) -> bool:
        """True when each step must be waited for: several CPU devices can deadlock when steps with sums queue up."""
        return self.n_devices > 1 and platform_name(self.devices[0]) == "cpu"

    def __str__(self) -> str:
        return "pmap" if self.n_devices > 1 else "jit"

    def state_shardings(self, tree: Any) -> Any:
        """The shardings of a state, or of a part of it: whole, on every device of this host."""
        sharding: jax.sharding.Sharding = SingleDeviceSharding(self.devices[0])
        if self.n_devices > 1:
            sharding = NamedSharding(self.local_mesh, PartitionSpec())
        return jax.tree.map(lambda _: sharding, tree)

    def make(self, make: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """The result of `make(*args)`, a part of a state, made in its place: no device has more than its shards. It
        takes the memory of the arguments with the numbers in `donate`."""
        shardings = self.state_shardings(jax.eval_shape(make, *args))
        return jax.jit(make, out_shardings=shardings, donate_argnums=donate)(*args)

    def checkpoint_shardings(self, tree: Any) -> Any:
        """The shardings of the arrays that checkpoints are saved from and restored to, over all hosts."""
        if self.n_devices == 1:
            return self.state_shardings(tree)
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree)

    def to_checkpoint(self, tree: Any) -> Any:
        """A state's arrays as global arrays, which checkpoints are saved from. Nothing is copied."""
        if jax.process_count() == 1:
            return tree
        return multihost_utils.host_local_array_to_global_array(tree, self.mesh, PartitionSpec())

    def from_checkpoint(self, tree: Any) -> Any:
        """Inverse of `to_checkpoint`."""
        if jax.process_count() == 1:
            return tree
        return multihost_utils.global_array_to_host_local_array(tree, self.mesh, PartitionSpec())

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of a tree that is to be restored to these devices."""
        return with_shardings(tree, self.checkpoint_shardings(tree))

    def replicas(self, params: Any) -> dict[int, Any]:
        """The parameters as each replica has them that this host takes part in: by its number, on its devices alone.
        Nothing is copied. Here, each device is a replica."""
        if self.n_devices == 1:
            return {0: params}
        return {i: jax.tree.map(lambda x, d=self.devices[i]: shards_of(x)[d], params) for i in self.local_indices}

    def microbatches(self, batch_size: int, microbatch_size: int) -> int:
        """Number A of microbatches that each share of the batch is cut into.

        Raises UserError when the batch does not divide into shares, or a share into microbatches.
        """
        share, rest = divmod(batch_size, self.n_shares)
        if rest:
            raise UserError(
                f"data.batch_size = {batch_size} does not divide over {self.n_shares} {self.shares_label}; "
                "change it, or set parallel.devices"
            )
        if microbatch_size and share % microbatch_size:
            raise UserError(
                f"data.microbatch_size = {microbatch_size} does not divide a device's share of the batch, {share} = "
                f"data.batch_size {batch_size} / {self.n_shares} {self.shares_label}"
            )
        return share // microbatch_size if microbatch_size else 1

    @property
    def shares_label(self) -> str:
        """The name of the shares of a batch in messages."""
        return "devices"

    def rows(self, batch_size: int, n_micro: int = 1) -> np.ndarray:
        """Indices of the rows of the global batch that this host loads for `split`, in that order."""
        share = batch_size // self.n_devices
        return np.concatenate([np.arange(i * share, (i + 1) * share) for i in self.local_indices])

    def split(self, batch: Any, n_micro: int | None = None) -> Any:
        """Puts this host's rows of a batch, a tree of arrays, on its devices. Each gets an equal share of them, in
        order, (B, ...), or (A, B, ...) with A microbatches."""

        def share(rows: np.ndarray) -> jax.Array:
            shape = (-1, *rows.shape[1:]) if n_micro is None else (n_micro, -1, *rows.shape[1:])
            if self.n_devices == 1:
                return jax.device_put(rows.reshape(shape), self.devices[0])
            local = rows.reshape(len(self.local_indices), *shape)
            return jax.device_put(local, NamedSharding(self.local_mesh, PartitionSpec(AXIS)))

        return jax.tree.map(share, batch)

    def gather(self, x: jax.Array) -> np.ndarray:
        """What a step compiled as `divided` computed of the rows of a batch in microbatches, those of all hosts, in the
        order of the global batch: (rows, ...)."""
        if self.n_devices == 1:
            return np.asarray(x).reshape(-1, *x.shape[2:])
        local = np.asarray(x).reshape(-1, *x.shape[3:])
        if jax.process_count() == 1:
            return local
        n_micro, batch_size = x.shape[1], len(local) * self.n_devices // len(self.local_indices)
        rows, values = multihost_utils.process_allgather((self.rows(batch_size, n_micro), local), tiled=True)
        return np.asarray(values)[np.argsort(rows)]

    def jit(self, step: Callable[..., Any], donate: bool, divided: bool = False) -> Any:
        """`step(state, batch)` compiled for these devices; the state is donated if `donate`. divided: it computes
        something of each row, which stays on the device of the row, as `split` puts rows there; else, a state."""
        donated = (0,) if donate else ()
        if self.n_devices == 1:
            return jax.jit(step, donate_argnums=donated)
        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=0 if divided else None,
            donate_argnums=donated,
            devices=self.devices if jax.process_count() == 1 else None,  # With several hosts, pmap takes all devices.
        )


class MeshPlacement(Placement):
    """The devices of a run in a mesh of data x fsdp x context x tensor, which divides batches and the state: see
    model/sharding.

    Raises UserError when the mesh has another number of devices, or the model does not divide over it.
    """

    def __init__(self, devices: Sequence[jax.Device], config: ParallelConfig, model: ModelConfig) -> None:
        super().__init__(devices)
        shape = config.mesh_shape(len(self.devices))
        why = sharding.indivisible(model, *shape[1:])
        if why:
            raise UserError(why)
        per_host = len(self.local_indices) or len(self.devices)
        alike = shape[2] * shape[3]  # Number of devices with the same sequences.
        if per_host % alike and alike % per_host:
            raise UserError(
                f"parallel.context x tensor = {alike} and the {per_host} devices of a host: one must divide the other"
            )
        self.mesh = Mesh(mesh_array(self.devices, shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))

    @property
    def n_shares(self) -> int:
        """See Placement."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def shares_label(self) -> str:
        """See Placement."""
        return "= parallel.data x parallel.fsdp"

    @property
    def axis_name(self) -> str | None:
        """See Placement. XLA inserts the sums."""
        return None

    def __str__(self) -> str:
        shape = self.mesh.shape.items()
        return "mesh " + " x ".join(f"{name} {n}" for name, n in shape if n > 1 or name != "context")

    def state_shardings(self, tree: Any) -> Any:
        """See Placement. Here, divided over fsdp, context and tensor."""
        return sharding.state_shardings(self.mesh, tree)

    def checkpoint_shardings(self, tree: Any) -> Any:
        """See Placement."""
        return self.state_shardings(tree)

    def to_checkpoint(self, tree: Any) -> Any:
        """See Placement."""
        return tree

    def from_checkpoint(self, tree: Any) -> Any:
        """See Placement."""
        return tree

    def replicas(self, params: Any) -> dict[int, Any]:
        """See Placement. A replica is a part of the mesh's data axis: a mesh of its own, whose axis fsdp stands for
        context, too, since both divide parameters, and one token at a time cannot be divided."""
        found: dict[int, Any] = {}
        for number, devices in enumerate(self.mesh.devices):
            shape = 1, devices.shape[0] * devices.shape[1], 1, devices.shape[2]
            mesh = Mesh(devices.reshape(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
            if mesh.local_devices:
                found[number] = jax.tree.map(on_part, params, sharding.state_shardings(mesh, params))
        return found

    def batch_sharding(self, n_micro: int | None) -> NamedSharding:
        """The sharding of a batch: (B, ...), or (A, B, ...) with microbatches."""
        dims = (sharding.BATCH_AXES,) if n_micro is None else (None, sharding.BATCH_AXES)
        return NamedSharding(self.mesh, PartitionSpec(*dims))

    def rows(self, batch_size: int, n_micro: int = 1) -> np.ndarray:
        """See Placement. Microbatches are consecutive parts of the global batch, each divided over the devices."""
        size = batch_size // n_micro
        slices = self.batch_sharding(None).addressable_devices_indices_map((size,)).values()
        columns = sorted({i for index in slices for i in range(*index[0].indices(size))})  # type: ignore[index]
        return (np.arange(n_micro)[:, None] * size + np.array(columns)).reshape(-1)

    def split(self, batch: Any, n_micro: int | None = None) -> Any:
        """See Placement."""

        def share(rows: np.ndarray) -> jax.Array:
            local = rows if n_micro is None else rows.reshape(n_micro, -1, *rows.shape[1:])
            return jax.make_array_from_process_local_data(self.batch_sharding(n_micro), local)

        return jax.tree.map(share, batch)

    def gather(self, x: jax.Array) -> np.ndarray:
        """See Placement."""
        whole = x if jax.process_count() == 1 else multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(whole).reshape(-1, *x.shape[2:])

    def jit(self, step: Callable[..., Any], donate: bool, divided: bool = False) -> Any:
        """See Placement."""

        def step_to_storage(*args: Any) -> Any:
            return step(*args) if divided else sharding.to_storage(step(*args))  # The state keeps its shardings.

        return OnMesh(jax.jit(step_to_storage, donate_argnums=(0,) if donate else ()), self.mesh)


def mesh_array(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in a mesh of that shape, in which the last axes have the devices nearest to each other.

    TPUs of one slice form a torus, into which JAX can lay a mesh. Several slices, and hosts with GPUs, are taken host
    by host, so that the last axes communicate within a host as far as it has enough devices.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if platform_name(devices[0]) == "tpu" and len(slices) == 1:
        with contextlib.suppress(NotImplementedError):  # It cannot lay out every shape.
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id))
    return np.array(ordered).reshape(shape)


def shards_of(x: jax.Array) -> dict[jax.Device, jax.Array]:
    """What each device of this host has of an array."""
    return {shard.device: shard.data for shard in x.addressable_shards}


def on_part(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array on a part of its devices, which have all of it, divided as it is. Nothing is copied."""
    shards = shards_of(x)
    parts = [shards[device] for device in sharding.mesh.local_devices]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A compiled function whose program sees the mesh that it is to run on."""

    jitted: Any
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def lower(self, *args: Any) -> Any:
        """The program for arguments of these shapes and shardings, not yet compiled."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
