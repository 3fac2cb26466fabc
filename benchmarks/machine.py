"""What machine this is, and what its memory and its matrix units can do at best, measured."""

import functools
import os
import platform
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import best_of_ten
from benchmarks.worker import ENVIRONMENT, FailedError, Worker
from gpt_jax.errors import UserError
from gpt_jax.system import available_cores

MATMUL = 2048
"""Rows and columns of the matrices whose product is timed."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


class JaxProbe:
    """Asks JAX, in a process of its own: the referee must hold no accelerator."""

    def __init__(self) -> None:
        from gpt_jax import runtime

        runtime.setup()

    def devices(self) -> dict[str, Any]:
        """Platform (cpu, gpu, tpu), kind, number, peak FLOP/s in bfloat16 of one where that is known, XLA's flags."""
        from gpt_jax import runtime

        devices = runtime.local_devices()
        kind = devices[0].device_kind
        found = {"platform": runtime.platform_name(devices[0]), "device": kind, "devices": len(devices)}
        return {**found, "peak_flops": runtime.peak_flops(kind), "xla_flags": os.environ.get("XLA_FLAGS", "")}

    def matmul(self) -> float:
        """FLOP/s of a float32 matrix product: the best of ten."""
        import jax
        import jax.numpy as jnp

        a, multiply = jnp.ones((MATMUL, MATMUL)), jax.jit(lambda a: a @ a)
        return best_of_ten(lambda: multiply(a).block_until_ready(), 2 * MATMUL**3)


class TorchProbe:
    """Asks PyTorch, in a process of its own."""

    def __init__(self) -> None:
        import torch

        self.torch, (self.device, self.synchronize) = torch, torch_device()

    def cuda(self) -> bool:
        """Whether there is a GPU for it."""
        return self.device == "cuda"

    def bandwidth(self) -> float:
        """Bytes a second read from memory: the best of ten sums over an array that no cache holds."""
        array = self.torch.ones(2**30 if self.cuda() else 2**27, device=self.device)
        return best_of_ten(lambda: (array.sum(), self.synchronize()), array.nbytes)

    def matmul(self) -> float:
        """FLOP/s of a float32 matrix product: the best of ten."""
        a = self.torch.ones((MATMUL, MATMUL), device=self.device)
        return best_of_ten(lambda: (a @ a, self.synchronize()), 2 * MATMUL**3)


def torch_device() -> tuple[str, Any]:
    """PyTorch's device, with all cores in use where it is the CPU, and what waits for its work to be done."""
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return "cuda", torch.cuda.synchronize
    torch.set_num_threads(available_cores())
    return "cpu", lambda: None


def describe() -> dict[str, Any]:
    """This machine, the versions of the packages, and the flags.

    Raises UserError where a package is missing, or where JAX and PyTorch do not run on the same kind of device.
    """
    if missing := [name for name in ("torch", "transformers") if not find_spec(name)]:
        raise UserError(f'{" and ".join(missing)} cannot be compared with: not installed; pip install -e ".[bench]"')
    try:
        with Worker("benchmarks.machine:JaxProbe") as jax_probe, Worker("benchmarks.machine:TorchProbe") as torch_probe:
            devices, cuda = jax_probe.ask("devices"), torch_probe.ask("cuda")
    except FailedError as e:
        raise UserError(f"the libraries do not start: {e}") from e
    on_cpu, cores = devices["platform"] == "cpu", available_cores()
    if (devices["platform"] == "gpu") != cuda:
        raise UserError(
            f"JAX runs on {devices['device']} and PyTorch on {'a GPU' if cuda else 'the CPU'}, which is no comparison; "
            "install both for the GPU (extra cuda12 or cuda13), or hide it with CUDA_VISIBLE_DEVICES="
        )
    flags = {"XLA_FLAGS": devices.pop("xla_flags"), **ENVIRONMENT}
    count, unit = (cores, "core") if on_cpu else (devices["devices"], "device")
    return {
        "name": f"{cpu_name() if on_cpu else devices['device']}, {count} {unit}{'s' if count > 1 else ''}",
        "cpu": cpu_name(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **devices,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "flags": flags,
    }


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_name(machine: dict[str, Any]) -> str:
    """The name of this machine's file of results."""
    return re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-") + ".json"


@functools.cache
def fastest_matmul() -> float:
    """FLOP/s of a float32 matrix product, in the better of both libraries; measured once a run, so that what shares are
    of is the same in all rows."""
    found = []
    for probe in ("TorchProbe", "JaxProbe"):
        with Worker(f"benchmarks.machine:{probe}") as worker:
            found.append(float(worker.ask("matmul")))
    return max(found)
