"""The gradients that norms and activations have of their own, against those that JAX derives."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.layers import ACTIVATIONS, LayerNorm, RMSNorm

THEIRS = {"gelu_tanh": nn.gelu, "gelu": lambda x: nn.gelu(x, approximate=False), "silu": nn.silu, "relu": nn.relu}
NORMS = [
    (LayerNorm(True, 1e-5, jnp.float32), nn.LayerNorm(epsilon=1e-5)),
    (LayerNorm(False, 1e-5, jnp.float32), nn.LayerNorm(epsilon=1e-5, use_bias=False)),
    (RMSNorm(1e-6, jnp.float32), nn.RMSNorm(epsilon=1e-6)),
]


def saved(function: Any, *arrays: jax.Array) -> int:
    """The numbers that the backward pass takes from the forward pass."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], *arrays)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_has_the_gradient_that_jax_derives_and_saves_its_input_alone(
    rng: np.random.Generator, name: str
) -> None:
    x, to_y = (jnp.asarray(rng.normal(scale=3, size=(5, 64)), jnp.float32) for _ in range(2))
    y, gradient = jax.jit(lambda x: jax.vjp(ACTIVATIONS[name], x))(x)
    expected, derived = jax.vjp(THEIRS[name], x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient(to_y)[0], derived(to_y)[0], rtol=1e-5, atol=1e-5)
    assert saved(ACTIVATIONS[name], x) <= x.size


@pytest.mark.parametrize(("ours", "theirs"), NORMS, ids=["LayerNorm", "LayerNorm without bias", "RMSNorm"])
def test_a_norm_has_the_gradient_that_jax_derives_and_saves_little(
    rng: np.random.Generator, ours: nn.Module, theirs: nn.Module
) -> None:
    """Within 1e-5 of flax's in float32, and in bfloat16 within two of its roundings; saved are the input, the scale
    and bias, and at most two numbers a row."""
    D, rows = 64, (3, 5)
    x, to_y = (jnp.asarray(rng.normal(1, 3, (*rows, D)), jnp.float32) for _ in range(2))
    names = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]
    params = {name: jnp.asarray(rng.normal(size=D), jnp.float32) for name in names}

    def gradients(module: nn.Module, x: jax.Array) -> Any:
        _, gradient = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return gradient(to_y)

    expected = gradients(theirs, x)
    for found, derived in zip(*map(jax.tree.leaves, (jax.jit(lambda x: gradients(ours, x))(x), expected)), strict=True):
        np.testing.assert_allclose(found, derived, rtol=1e-5, atol=1e-5)
    rounded = jax.tree.leaves(gradients(ours, x.astype(jnp.bfloat16)))
    for found, derived in zip(rounded, jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float32) - derived) / np.linalg.norm(derived)
        assert error < 2 * 2**-8
    assert saved(lambda x: ours.apply({"params": params}, x), x) <= x.size + 2 * 15 + 2 * D
