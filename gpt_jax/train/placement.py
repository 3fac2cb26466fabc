"""How the pure steps run on devices: plain jit on one, pmap over several, the state never stacked.

With `in_axes=(None, 0)` and `out_axes=None` every device holds the whole state, and what comes back looks like an
ordinary array: checkpoints, logs and sampling need not know how many devices there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt_jax.errors import UserError
from gpt_jax.runtime import platform_name

AXIS = "data"


class Placement:
    """The devices of a run, all of one kind, each with the whole state and an equal share of every batch."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,))

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.devices)

    @property
    def axis_name(self) -> str | None:
        """The mapped axis that the steps sum over; None on one device."""
        return AXIS if self.n_devices > 1 else None

    @property
    def must_wait(self) -> bool:
        """Whether each step must be waited for: several CPU devices can deadlock when steps with sums queue up."""
        return self.n_devices > 1 and platform_name(self.devices[0]) == "cpu"

    def replicated(self) -> jax.sharding.Sharding:
        """The sharding of the state: whole, on every device."""
        if self.n_devices == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and sharding of a state that is to be restored to these devices."""
        sharding = self.replicated()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def microbatches(self, batch_size: int, microbatch_size: int) -> int:
        """Number A of microbatches that each device's share of the batch is cut into.

        Raises UserError when the batch does not divide over the devices, or a share over microbatches.
        """
        share, rest = divmod(batch_size, self.n_devices)
        if rest:
            raise UserError(
                f"data.batch_size = {batch_size} does not divide over {self.n_devices} devices; "
                "change it, or set parallel.devices"
            )
        if microbatch_size and share % microbatch_size:
            raise UserError(
                f"data.microbatch_size = {microbatch_size} does not divide a device's share of the batch, {share} = "
                f"data.batch_size {batch_size} / {self.n_devices} devices"
            )
        return share // microbatch_size if microbatch_size else 1

    def split(self, array: np.ndarray, *shape: int) -> jax.Array:
        """A batch (B, ...) on the devices: each gets an equal share of its rows, in order, as (*shape, -1, ...)."""
        if self.n_devices == 1:
            return jax.device_put(array.reshape(*shape, -1, *array.shape[1:]), self.devices[0])
        local = array.reshape(self.n_devices, *shape, -1, *array.shape[1:])
        return jax.device_put(local, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def jit(self, step: Callable[..., Any], n_batch_args: int, donate: bool) -> Callable[..., Any]:
        """`step(state, *batches)` compiled for these devices; the first argument is donated if `donate`."""
        donated = (0,) if donate else ()
        if self.n_devices == 1:
            return jax.jit(step, donate_argnums=donated)
        in_axes = (None, *(0,) * n_batch_args)
        return jax.pmap(
            step, axis_name=AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donated, devices=self.devices
        )
