"""What is asked of NVIDIA GPUs, and above all of cuDNN's attention.

A test that takes `device` runs on the GPU. Where there is none, it runs on CPU, in bfloat16 all the same, with JAX's
own formula in the place of cuDNN's kernel, called with the same arguments: everything but the kernel is tested
everywhere.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from gpt_jax.runtime import platform_name

# The commands that a test starts share the GPU with the tests. JAX reads this when it starts.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.exhaustive), pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[jax.Device]:
    """The GPU, or the CPU as what stands in for one."""
    device, asked = jax.devices()[0], request.param
    platform = platform_name(device)
    if asked != platform:
        pytest.skip(f"needs an NVIDIA GPU, and JAX has: {platform}" if asked == "gpu" else f"runs on the {platform}")
    if platform == "cpu":
        real = jax.nn.dot_product_attention

        def by_formula(*args: Any, implementation: str, **options: Any) -> Any:
            assert implementation == "cudnn"
            return real(*args, implementation="xla", **options)

        monkeypatch.setattr(jax.nn, "dot_product_attention", by_formula)
    with jax.default_device(device):
        yield device


@pytest.fixture
def as_if_for_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets programs that call cuDNN or kernels of ours be traced and lowered, where there is no GPU to run them."""
    if platform_name(jax.devices()[0]) == "gpu":
        yield
        return
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91200)
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        yield
