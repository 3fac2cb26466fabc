"""What must be settled before JAX starts its devices, and what the devices can do at best.

`setup` has to run before anything asks for a device: XLA reads its flags, and the CPU is divided, only once.
"""

import os
import sys
from pathlib import Path

import jax

from gpt_jax.config import Config
from gpt_jax.errors import UserError

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
"""jaxlib 0.10.2 computes some fused reductions wrongly on CPU, and can crash in them (jax-ml/jax#39103, #40412)."""

SMALL_MODEL_PARAMS = 32_000_000
"""Up to this size, one CPU device a core is faster than one device with threads inside its operations: 47 to 27 ms a
step with 0.8 million parameters, 849 to 738 with 10.6 million, but 3240 to 4060 with 124 million, where every device
repeats the optimizer's pass over parameters that no cache holds."""


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_cpu_devices(config: Config) -> int:
    """CPU devices to train on: what `parallel.devices` asks for, or else one a core for models of up to 32 million
    parameters (as many as divide the batch), and one for larger ones."""
    if config.parallel.devices:
        return config.parallel.devices
    if config.model.n_params > SMALL_MODEL_PARAMS:
        return 1
    return max(n for n in range(1, cpu_count() + 1) if config.data.batch_size % n == 0)


def setup(cpu_devices: int = 1) -> None:
    """Sets XLA's flags, the number of CPU devices and the compile cache. Call once, before any device is used."""
    if "xla_cpu_experimental_ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CPU_FLAG}".strip()
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    use_compile_cache()


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, under the user's cache folder unless JAX_COMPILATION_CACHE_DIR names one.

    The folder is private: whoever can write to it can run code as this user.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            print(f"no compile cache: {folder} cannot be made ({e.strerror})", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)


def choose_devices(config: Config) -> list[jax.Device]:
    """The local devices to train on. Raises UserError when more are asked for than there are."""
    devices = jax.local_devices()
    wanted = config.parallel.devices or len(devices)
    if wanted > len(devices):
        raise UserError(f"parallel.devices = {wanted}, but this machine has {len(devices)}; 0 takes all of them")
    return devices[:wanted]


def platform_name(device: jax.Device) -> str:
    """cpu, gpu or tpu."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


PEAK_TFLOPS = (
    # Dense bfloat16 matrix products with float32 accumulation, in TFLOP/s a JAX device, by the beginning of JAX's
    # device_kind; the first that fits counts. TPU v2, v3 and v7 have two JAX devices a chip, the others one.
    # Google: cloud.google.com/tpu/docs, the page of each version.
    ("TPU v2", 45 / 2),
    ("TPU v3", 123 / 2),
    ("TPU v4 lite", 138),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v6", 918),
    ("TPU7x", 2307 / 2),
    ("TPU v7", 2307 / 2),
    # NVIDIA: the data sheet or architecture white paper of each, without sparsity.
    ("NVIDIA A100", 312),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H100", 989.4),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500),
    ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA GeForce RTX 5080", 112.6),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 4080", 97.5),
    ("NVIDIA GeForce RTX 3090", 71),
    ("NVIDIA GeForce RTX 3080", 59.5),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in bfloat16; None for a device that the table does not have."""
    for prefix, tflops in PEAK_TFLOPS:
        if device_kind.lower().startswith(prefix.lower()):
            return tflops * 1e12
    return None
