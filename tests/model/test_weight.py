"""Products by the kind of weight, and by the platform that a program is compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoraConfig
from gpt_jax.model.lora import for_rows, joined
from gpt_jax.model.weight import FEW_ROWS, decoding_product, product
from gpt_jax.run.quantized import quantize


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 5, 16), (3, FEW_ROWS, 16)])
def test_every_kind_of_weight_is_the_same_matrix(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(16, 24)).astype(np.float32)
    for weights in ({"kernel": kernel}, {"kernel_FD": np.ascontiguousarray(kernel.T)}):
        ours = jax.jit(lambda x, weights: product(x, weights, jnp.float32))(x, weights)
        np.testing.assert_allclose(ours, x.reshape(-1, 16) @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("base", ["kernel", "int8"])
def test_each_row_has_its_own_adapters(rng: np.random.Generator, base: str, T: int) -> None:
    """Those of two runs, of which the second does not adapt the first layer; row 0 has none."""
    runs = LoraConfig(rank=2, alpha=3.0), LoraConfig(rank=3, alpha=12.0)
    names = ["up", "down"], ["down"]

    def own(rank: int, name: str) -> dict[str, np.ndarray]:
        D, F = (16, 24) if name == "up" else (24, 16)
        shapes = {"lora_a": (2, D, rank), "lora_b": (2, rank, F)}
        return {part: rng.normal(size=shape).astype(np.float32) for part, shape in shapes.items()}

    trees = [{"layers": {name: own(lora.rank, name) for name in its}} for lora, its in zip(runs, names, strict=True)]
    adapters = joined(list(zip(trees, runs, strict=True)))
    assert adapters.n == 2
    for name in ("up", "down"):
        D, F = (16, 24) if name == "up" else (24, 16)
        x_BTD, kernel_FD = rng.normal(size=(3, T, D)).astype(np.float32), rng.normal(size=(F, D)).astype(np.float32)
        matrix: dict[str, np.ndarray] = {"kernel_FD": kernel_FD}
        if base == "int8":
            matrix["kernel_FD"], matrix["scale_F"] = quantize(kernel_FD)
            kernel_FD = matrix["kernel_FD"] * matrix["scale_F"][:, None]
        for i in range(2):
            layer = for_rows({name: {**matrix, **adapters.layers[i][name]}}, jnp.asarray(adapters.scales_AR[[0, 2, 1]]))
            ours = jax.jit(lambda x, weights: product(x, weights, jnp.float32))(x_BTD, layer[name])
            for x_TD, y_TF, number in zip(x_BTD, ours.reshape(3, T, F), (0, 2, 1), strict=True):
                expected = x_TD @ kernel_FD.T
                if number and name in names[number - 1]:
                    a, b = (trees[number - 1]["layers"][name][part][i] for part in ("lora_a", "lora_b"))
                    expected += runs[number - 1].alpha / runs[number - 1].rank * (x_TD @ a @ b)
                np.testing.assert_allclose(y_TF, expected, rtol=1e-3, atol=1e-2 if base == "int8" else 1e-4)


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
