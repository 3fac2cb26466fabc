"""The targets of plans, by the names under which they are rented: v5e-16, v5p-32, h100x8."""

import re
from dataclasses import dataclass
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.runtime import GPU_MEMORY_FRACTION, Hardware, peak_flops

GB, GIB = 10**9, 2**30
GPUS_A_HOST = 8


@dataclass(frozen=True)
class Chip:
    """A kind of device: memory in bytes, bandwidths in bytes a second."""

    kind: str  # JAX's device_kind, which has a peak in runtime.PEAK_TFLOPS.
    memory: float
    memory_bandwidth: float
    network_bandwidth: float  # To its neighbours, as published: all links of a chip together, one direction of NVLink.
    between_hosts: float = 0  # From a GPU to those of other hosts: the usual network card, one a GPU.
    names_cores: bool = False  # True when the number in a slice's name counts cores, of which a chip has two.
    dimensions: int = 0  # Of the torus; 0: a GPU.
    architecture: str = ""  # Of a GPU: its compute capability.

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak


CHIPS = {
    # cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
    "v4": Chip("TPU v4", 32 * GIB, 1228 * GB, 300 * GB, names_cores=True, dimensions=3),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 819 * GB, 200 * GB, dimensions=2),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765 * GB, 600 * GB, names_cores=True, dimensions=3),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 1640 * GB, 448 * GB, dimensions=2),
    # nvidia.com: data sheets, the SXM forms.
    "a100": Chip("NVIDIA A100-SXM4-80GB", 79.3 * GIB, 2039 * GB, 300 * GB, 25 * GB, architecture="8.0"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 79.6 * GIB, 3350 * GB, 450 * GB, 50 * GB, architecture="9.0"),
    "h200": Chip("NVIDIA H200", 140.4 * GIB, 4800 * GB, 450 * GB, 50 * GB, architecture="9.0"),
    "b200": Chip("NVIDIA B200", 179 * GIB, 8000 * GB, 900 * GB, 50 * GB, architecture="10.0"),
}

TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclass(frozen=True)
class Target:
    """A number of devices of a kind, and for TPUs their topology, such as 4x4."""

    name: str
    chip: Chip
    n_devices: int
    topology: str = ""

    @property
    def is_tpu(self) -> bool:
        """True for TPUs: programs for them can be compiled on a machine without them."""
        return self.topology != ""

    @property
    def hardware(self) -> Hardware:
        """What decides the attention and the compute type."""
        return Hardware("tpu" if self.is_tpu else "gpu", self.chip.architecture)

    @property
    def usable_memory(self) -> float:
        """Bytes of a device that a program may use: the fraction of a GPU that JAX takes, and nearly all of a TPU."""
        return self.chip.memory * (0.95 if self.is_tpu else GPU_MEMORY_FRACTION)

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second to the other devices; for GPUs of several hosts, to those of other hosts."""
        several = not self.is_tpu and self.n_devices > GPUS_A_HOST
        return self.chip.between_hosts if several else self.chip.network_bandwidth

    def devices(self) -> list[Any]:
        """Descriptions of the target's devices, for which JAX compiles with libtpu.

        Raises UserError when libtpu is not installed, or does not know such a slice.
        """
        from jax.experimental import topologies

        generation = self.name.partition("-")[0]
        more = {"chips_per_host_bounds": [1, 1, 1]} if self.n_devices == 1 else {}
        try:
            return list(topologies.get_topology_desc(f"{generation}:{self.topology}", "tpu", **more).devices)
        except Exception as e:  # Of many types; without libtpu, a RuntimeError that says so.
            if "lockfile" in str(e):
                raise UserError(
                    "another process is using libtpu, which serves one at a time; wait for it, or remove "
                    "/tmp/libtpu_lockfile if one was killed and left it behind"
                ) from e
            raise UserError(f"libtpu cannot compile for {self.name}: {(str(e).splitlines() or [''])[0]}") from e


def parse_target(name: str) -> Target:
    """The target of that name. Raises UserError naming the known targets when there is none."""
    name = name.strip().lower()
    match = re.fullmatch(r"(v\d+\w?)-(\d+)|(\w\d+)x(\d+)", name)
    generation, number = (match[1] or match[3], int(match[2] or match[4])) if match else ("", 0)
    chip = CHIPS.get(generation)
    if chip is None or (chip.dimensions == 0) != bool(match and match[3]) or number < 1:
        raise UserError(
            f"there is no target {name!r}; TPU slices are named like v5e-16, v5p-32, v6e-8, v4-8, and GPUs like "
            "h100x8, a100x8, h200x8, b200x8"
        )
    if not chip.dimensions:
        return Target(name, chip, number)
    sizes = {n * (1 + chip.names_cores): n for n in (TORUS_2D if chip.dimensions == 2 else TORUS_3D)}
    if number not in sizes:
        known = ", ".join(f"{generation}-{n}" for n in sizes)
        raise UserError(f"there is no slice {name!r} among those known here; there are {known}")
    n_devices = sizes[number]
    return Target(name, chip, n_devices, (TORUS_2D if chip.dimensions == 2 else TORUS_3D)[n_devices])
