"""Settings that JAX needs before it starts its devices, the choice of devices, and their peak speed.

`setup` must run before any device is used: XLA reads its flags, and divides the CPU, only once.
"""

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax

from gpt_jax.config import Config, ParallelConfig
from gpt_jax.errors import UserError
from gpt_jax.system import available_cores, cache_folder

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
"""jaxlib 0.10.2 computes some fused reductions wrongly on CPU, and can crash in them (jax-ml/jax#39103, #40412)."""

SMALL_MODEL_PARAMS = 32_000_000
"""Up to this size, one CPU device per core is faster than one device with threads inside its operations: 27 against
47 ms a step with 0.8 million parameters, 738 against 849 with 10.6 million, but 4060 against 3240 with 124 million,
where every device repeats the optimizer's pass over parameters that no cache holds."""


def choose_cpu_devices(config: Config) -> int:
    """Number of CPU devices to train on: that of `parallel.devices` or the mesh, or else one per core for models of up
    to 32 million parameters (as many as divide the batch), and one for larger ones."""
    if config.parallel.n_asked:
        return config.parallel.n_asked
    if config.model.n_params > SMALL_MODEL_PARAMS:
        return 1
    microbatch = config.data.microbatch_size or 1
    return max(n for n in range(1, available_cores() + 1) if n == 1 or config.data.batch_size % (n * microbatch) == 0)


GPU_MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that JAX takes when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set. JAX's own
default is three quarters."""


MEMORY_FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
"""The variables by which a user sets that share: the older name, which all versions of JAX know, and the newer one."""

NUMERICS: dict[str, Any] = {
    "enable_x64": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
}
"""Settings of JAX that would change, or refuse, what is computed and drawn: the code is written for JAX's defaults, so
JAX_ENABLE_X64 and the like have no say. Precision of products (JAX_DEFAULT_MATMUL_PRECISION), debugging
(JAX_DEBUG_NANS, JAX_DISABLE_JIT) and platforms stay the user's choice."""


@contextmanager
def own_numerics() -> Iterator[None]:
    """Computes with NUMERICS inside, whatever the program around set for itself. Also a decorator."""
    with ExitStack() as stack:
        for name, value in NUMERICS.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


_is_set_up = False


def setup(cpu_devices: int = 1) -> None:
    """Sets all that JAX needs for a process that is ours. Call once, before any device is used."""
    for name, value in NUMERICS.items():
        jax.config.update(f"jax_{name}", value)
    set_up_devices(cpu_devices)


def set_up_devices(cpu_devices: int) -> None:
    """Sets XLA's flags, the share of GPUs' memory, the number of CPU devices, the allocator and the compile cache."""
    global _is_set_up
    _is_set_up = True
    if not any(name in os.environ for name in MEMORY_FRACTION_VARIABLES):  # Both at once are an error.
        os.environ[MEMORY_FRACTION_VARIABLES[0]] = str(GPU_MEMORY_FRACTION)
    if "xla_cpu_experimental_ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CPU_FLAG}".strip()
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    keep_freed_memory()
    use_compile_cache()


def setup_once(cpu_devices: int = 1) -> None:
    """`setup` for programs that may have called it already, or use JAX for other things, too; existing devices and
    settings of numbers stay, see `own_numerics`.

    Warns when JAX was started before it could be set up, and computes on the CPU.
    """
    if _is_set_up:
        return
    try:
        set_up_devices(cpu_devices)
    except RuntimeError:  # The number of CPU devices can no longer be set.
        if platform_name(local_devices()[0]) == "cpu":
            message = f"JAX was started before gpt_jax could set {CPU_FLAG}; use gpt_jax first"
            warnings.warn(message, stacklevel=3)


def keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB of freed memory, instead of returning it to the kernel.

    XLA:CPU allocates the buffers of every step anew. Large ones would be mapped, cleared and unmapped each time: with
    4 layers of width 128, 1,536 tokens a step and a vocabulary of 2,048, that was 40 of 95 ms.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # Names and numbers of mallopt(3).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or else in the user's cache folder, if they
    took JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS to compile, or else 0.1 s.

    The folder is private, because anyone who can write to it can run code as this user.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        try:
            folder = cache_folder() / "xla"
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as e:
            print(f"no compile cache: {e.filename} cannot be made ({e.strerror})", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def local_devices() -> list[jax.Device]:
    """This process's devices. Raises UserError when JAX finds none."""
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as e:  # JAX_PLATFORMS names a platform that is missing.
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={asked} asks for a platform that is not here" if asked else str(e).partition("\n")[0]
        raise UserError(f"JAX finds no device: {why}") from e


def choose_devices(parallel: ParallelConfig) -> list[jax.Device]:
    """The devices of all hosts to use. Raises UserError when `parallel.devices` is more than a host has, or, with
    several hosts, fewer."""
    devices = local_devices()
    count = parallel.devices or len(devices)
    if count > len(devices):
        raise UserError(f"parallel.devices = {count}, but this machine has {len(devices)}; 0 takes all of them")
    if jax.process_count() == 1:
        return devices[:count]
    if not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} hosts; start all of them with --coordinator auto")
    if count < len(devices):
        raise UserError(f"parallel.devices = {count}, but each of several hosts trains on all it has: {len(devices)}")
    return jax.devices()


def platform_name(device: jax.Device) -> str:
    """cpu, gpu or tpu."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


class Hardware(NamedTuple):
    """What decides which attention and which compute type a device runs."""

    platform: str  # cpu, gpu or tpu.
    architecture: str = ""  # Of a GPU, as JAX has it: the compute capability, such as 8.0, or the name, such as gfx90a.
    cudnn: int = 99_999  # The version of cuDNN, such as 91100; 0: there is none. As if recent where it is not known.
    deterministic: bool = False  # XLA is asked for programs that give the same bits in every run.

    @property
    def capability(self) -> tuple[int, ...]:
        """The compute capability of an NVIDIA GPU, such as (8, 0); empty for all else."""
        is_nvidia = re.fullmatch(r"\d+\.\d+", self.architecture)
        return tuple(map(int, self.architecture.split("."))) if is_nvidia else ()


def hardware(device: jax.Device) -> Hardware:
    """The hardware of a device."""
    if platform_name(device) != "gpu":
        return Hardware(platform_name(device))
    from jax._src.lib import cuda_versions  # As JAX's own check of cuDNN reads it; None without CUDA.

    architecture = str(getattr(device, "compute_capability", ""))
    cudnn = cuda_versions.cudnn_get_version() if cuda_versions else 0
    return Hardware("gpu", architecture, cudnn, re.search(DETERMINISTIC, os.environ.get("XLA_FLAGS", "")) is not None)


DETERMINISTIC = r"xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=true|=1|\s|$)"
"""XLA's flags for programs that give the same bits in every run."""


PEAK_TFLOPS = {
    # Dense bfloat16 matrix products with float32 accumulation, in TFLOP/s a JAX device, by a pattern that matches the
    # whole of JAX's device_kind. TPU v2, v3 and v7 have two JAX devices a chip, the others one.
    # cloud.google.com/tpu/docs/v2, /v3, /v4, /v5e, /v5p, /v6e, /tpu7x
    r"TPU v2": 45 / 2,
    r"TPU v3": 123 / 2,
    r"TPU v4": 275,
    r"TPU v5 lite|TPU v5e": 197,
    r"TPU v5p?": 459,
    r"TPU v6 lite|TPU v6e": 918,
    r"TPU7x|TPU v7x?": 2307 / 2,
    # nvidia.com: the data sheets of A100, H100, H200, B200, L4, L40S and RTX A6000, without sparsity.
    r"NVIDIA A100[ -].*": 312,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H100 80GB HBM3|NVIDIA GH200 .*": 989.4,
    r"NVIDIA H200( NVL)?": 989.4,
    r"NVIDIA B200": 2250,
    r"NVIDIA L40S": 362,
    r"NVIDIA L4": 121,
    r"NVIDIA RTX A6000": 154.8,
    # nvidia.com: the white papers of the architectures Ampere GA102, Ada and Blackwell RTX, table of specifications.
    r"NVIDIA GeForce RTX 5090": 209.5,
    r"NVIDIA GeForce RTX 5080": 112.6,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 4080": 97.5,
    r"NVIDIA GeForce RTX 3090": 71,
    r"NVIDIA GeForce RTX 3080": 59.5,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in bfloat16; None for a device that the table lacks, and for a MIG slice of one."""
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, device_kind) and "MIG" not in device_kind:
            return tflops * 1e12
    return None
