"""The kernel of the loss, on a GPU, against the formula on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config.model import DTypeName
from gpt_jax.model.head import hide_padding
from gpt_jax.model.loss import nats_and_gradient
from gpt_jax.model.loss_kernel import BLOCK
from tests.gpu.closeness import ROUNDING


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab_size", "rows"), [(65, 65), (50257, 50304), (128256, 128256)])
def test_the_kernel_computes_the_formula(device: jax.Device, vocab_size: int, rows: int, dtype: DTypeName) -> None:
    """Nats within 1e-5 of their size, and gradients within 1e-4, or where both were rounded to bfloat16, at most as
    neighbours. Small vocabularies have no kernel."""
    rng = np.random.default_rng(0)
    logits = hide_padding(jnp.asarray(rng.normal(scale=4, size=(300, rows)), jnp.float32), vocab_size)
    tokens = logits, rng.integers(0, vocab_size, 300, np.int32), rng.random(300, np.float32)

    def on(device: jax.Device) -> tuple[np.ndarray, np.ndarray, str]:
        here = jax.device_put(tokens, device)
        compiled = jax.jit(nats_and_gradient, static_argnums=3).lower(*here, dtype).compile()
        nats, gradient = compiled(*here)
        return np.asarray(nats), np.asarray(gradient, np.float32), compiled.as_text() or ""

    nats, gradient, program = on(device)
    expected, expected_gradient, _ = on(jax.devices("cpu")[0])
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=1e-4 if dtype == "float32" else 2 * ROUNDING, atol=1e-7
    )
    assert ("triton" in program) == (device.platform != "cpu" and rows >= BLOCK)
