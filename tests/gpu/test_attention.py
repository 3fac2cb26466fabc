"""cuDNN's attention against the formula in float32 on CPU: forward and backward."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.backend import refusal, resolve
from gpt_jax.model.kernels import causal_by_cudnn, causal_by_mask
from gpt_jax.runtime import Hardware, hardware, platform_name
from tests.gpu.closeness import assert_close

OUTPUT, GRADIENTS = 2, 4
"""Roundings to bfloat16: of the weights and of the output; and for gradients those of the output's product with its
gradient, of the scores' gradients, and of the result."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, and which keys a query sees."""

    T: int
    H: int = 4
    G: int = 4
    K: int = 64
    window: int = 0
    packed: bool = False

    def arrays(self) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """q, k, v and the gradient of the output, bfloat16, and the segments of two rows."""
        rng, shapes = np.random.default_rng(0), [(2, self.T, n, self.K) for n in (self.H, self.G, self.G, self.H)]
        arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
        t = jnp.arange(self.T, dtype=jnp.int32)
        segments = jnp.stack([t // 50, jnp.int32(t > 3) + jnp.int32(t == self.T - 1)])
        return arrays, segments if self.packed else None


CASES = {
    "causal": Case(128),
    "odd length": Case(129),
    "grouped queries": Case(200, G=2),
    "window": Case(256, window=32),
    "widest heads, multi-query": Case(256, G=1, K=128),
    "heads that are no power of two": Case(128, H=2, G=2, K=40),
    "packed": Case(128, packed=True),
    "packed, odd, grouped, window": Case(257, G=2, window=48, packed=True),
}


def results(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
    """The output, and the gradients of q, k and v, computed by one program, as float32."""

    def forward_and_backward(q: Any, k: Any, v: Any, gradient: Any) -> Any:
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(gradient)

    return [np.asarray(x, np.float32) for x in jax.jit(forward_and_backward)(*arrays)]


@functools.cache
def expected(case: Case) -> list[np.ndarray]:
    """The formula's results in float32 on CPU, from the same numbers."""

    with jax.default_device(jax.devices("cpu")[0]):
        arrays, segments = case.arrays()

        def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return causal_by_mask(q, k, v, case.window, 0.0, None, segments)

        return results(formula, tuple(x.astype(jnp.float32) for x in arrays))


def assert_all_close(ours: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Output and gradients, each token's within what is allowed."""
    for x, y, roundings in zip(ours, expected, (OUTPUT, GRADIENTS, GRADIENTS, GRADIENTS), strict=True):
        assert_close(x, y, roundings, n_axes=2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cudnn_computes_the_formula(device: jax.Device, case: Case) -> None:
    arrays, segments = case.arrays()

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_by_cudnn(q, k, v, segments, segments, case.window)

    assert_all_close(results(cudnn, arrays), expected(case))


@pytest.mark.parametrize("name", ["window", "packed, odd, grouped, window"])
def test_one_key_too_many_is_noticed(name: str) -> None:
    """The tolerance is narrow enough."""
    case = CASES[name]
    with pytest.raises(AssertionError, match="roundings"):
        assert_all_close(expected(dataclasses.replace(case, window=case.window + 1)), expected(case))


CONFIG = ModelConfig(vocab_size=64, context_length=128, n_layer=1, n_head=2, d_model=128)


def here() -> Hardware:
    """The GPU; where there is none, the one that JAX's check takes for granted."""
    device = jax.devices()[0]
    return hardware(device) if platform_name(device) == "gpu" else Hardware("gpu", "8.0")


@pytest.mark.parametrize("T", [1, 2, 63, 128])
@pytest.mark.parametrize("K", [8, 40, 64, 128, 4, 12, 100, 136, 256, 264])
def test_what_is_not_refused_jax_takes(as_if_for_an_h100: None, K: int, T: int) -> None:
    """With segments and without; and what is refused, JAX refuses, too."""
    why = refusal("cudnn", dataclasses.replace(CONFIG, d_head=K, dtype="bfloat16"), here())
    q, segments = jax.ShapeDtypeStruct((2, T, 2, K), jnp.bfloat16), jax.ShapeDtypeStruct((2, T), jnp.int32)

    def backward(q: jax.Array, segments: jax.Array | None) -> jax.Array:
        return jax.vjp(lambda q: causal_by_cudnn(q, q, q, segments, segments, 0), q)[1](q)[0]

    for given in (segments, None):
        if why is None:
            assert jax.eval_shape(backward, q, given).dtype == jnp.bfloat16
        else:
            assert f"in steps of 8, not {K}" in why
            with pytest.raises(NotImplementedError, match="head dim"):
                jax.eval_shape(backward, q, given)


def test_what_cudnn_refuses_is_said() -> None:
    """ "auto" takes the formula, by name; who asks for cuDNN is told why not."""
    config = dataclasses.replace(CONFIG, d_head=12)
    assert resolve(config, here()).attention == "xla"
    with pytest.raises(UserError, match=r"attention = cudnn cannot run here: .* in steps of 8, not 12"):
        resolve(dataclasses.replace(config, attention="cudnn"), here())
