"""Products by the kind of weight, and by the platform that a program is compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.weight import FEW_ROWS, decoding_product, product


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 5, 16), (3, FEW_ROWS, 16)])
def test_every_kind_of_weight_is_the_same_matrix(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(16, 24)).astype(np.float32)
    for weights in ({"kernel": kernel}, {"kernel_FD": np.ascontiguousarray(kernel.T)}):
        ours = jax.jit(lambda x, weights: product(x, weights, jnp.float32))(x, weights)
        np.testing.assert_allclose(ours, x.reshape(-1, 16) @ kernel, rtol=1e-5, atol=1e-5)


def lowered(platform: str, n_rows: int) -> str:
    x_ND, kernel_FD = jnp.zeros((n_rows, 8), jnp.bfloat16), jnp.zeros((16, 8), jnp.bfloat16)
    traced = jax.jit(lambda x, kernel: decoding_product(x, kernel, jnp.float32)).trace(x_ND, kernel_FD)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_the_program_decides_and_not_the_one_that_compiles_it() -> None:
    """Operands are exchanged in programs for CPUs alone, wherever they are made."""
    assert "optimization_barrier" in lowered("cpu", FEW_ROWS)
    assert "optimization_barrier" not in lowered("cpu", FEW_ROWS + 1)
    for platform in ("tpu", "cuda"):
        assert "optimization_barrier" not in lowered(platform, 1)
