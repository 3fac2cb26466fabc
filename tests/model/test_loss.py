import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.config.model import DTypeName
from gpt_jax.model import loss_kernel
from gpt_jax.model.head import hide_padding
from gpt_jax.model.loss import nats_and_gradient, nats_in_chunks, sum_of_nats


def reference(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    peak = logits.max(-1)
    logsumexp = np.log(np.exp(logits - peak[..., None]).sum(-1)) + peak
    return float(((logsumexp - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * mask).sum())


def by_nats(hidden: Any, head: Any, targets: jax.Array, weights: jax.Array, vocabulary: int, chunk: int) -> jax.Array:
    """`sum_of_nats`, by the nats of each token."""
    return jnp.sum(nats_in_chunks(hidden, head, targets, vocabulary, chunk) * weights)


both = pytest.mark.parametrize("total", [by_nats, sum_of_nats])


@both
@pytest.mark.parametrize("chunk", [1, 7, 8, 21, 1000])
def test_loss_and_gradient_do_not_depend_on_the_chunk(rng: np.random.Generator, total: Any, chunk: int) -> None:
    hidden = rng.normal(size=(3, 7, 16)).astype(np.float32)
    head = rng.normal(size=(50, 16)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, 47, (3, 7)))
    weights = np.where(rng.random((3, 7)) < 0.7, rng.random((3, 7)), 0).astype(np.float32)

    def loss(total: Any, hidden: jax.Array, head: jax.Array, weights: jax.Array, chunk: int) -> jax.Array:
        return jnp.sin(total(hidden, head, targets, weights, 47, chunk) / 10)

    def value_and_gradients(total: Any, chunk: int) -> Any:
        return jax.value_and_grad(loss, argnums=(1, 2, 3))(total, hidden, head, weights, chunk)

    value, gradients = value_and_gradients(total, chunk)
    expected = reference(hidden, head[:47], np.asarray(targets), weights)
    assert float(total(hidden, head, targets, weights, 47, chunk)) == pytest.approx(expected, rel=1e-5)
    assert float(value) == pytest.approx(np.sin(expected / 10), abs=1e-4)
    for chunked, whole in zip(gradients, value_and_gradients(by_nats, 10_000)[1], strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-5)


@both
def test_full_logits_never_exist(total: Any) -> None:
    """The compiled gradient needs less memory than the logits of all tokens alone would take."""
    n_tokens, vocabulary, width, chunk = 4096, 8192, 64, 256
    hidden = jnp.zeros((1, n_tokens, width))
    head = jnp.zeros((vocabulary, width))
    targets = jnp.zeros((1, n_tokens), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return total(hidden, head, targets, jnp.ones(targets.shape), head.shape[0], chunk)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n_tokens * vocabulary * 4 / 4


@both
def test_all_products_of_the_head_multiply_bfloat16(rng: np.random.Generator, total: Any) -> None:
    hidden = jnp.asarray(rng.normal(size=(1, 8, 16)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.zeros((1, 8), jnp.int32)
    gradients = jax.jit(jax.grad(lambda h, w: total(h, w, targets, jnp.ones((1, 8)), 50, 100), argnums=(0, 1)))
    products = re.findall(r"stablehlo.dot_general.*: \((.*)\) ->", gradients.lower(hidden, head).as_text())
    of_the_head = [operands for operands in products if "50x" in operands or "x50" in operands]
    assert len(of_the_head) == 3
    assert all(operands.count("bf16>") == 2 for operands in of_the_head), of_the_head
    of_hidden, of_head = gradients(hidden, head)
    assert (of_hidden.dtype, of_head.dtype) == (jnp.bfloat16, jnp.float32)
    exact = gradients(hidden.astype(jnp.float32), head)
    for found, expected in zip((of_hidden, of_head), exact, strict=True):
        distance = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
        assert distance < 1e-2


def flops(total: Any, chunk: int, argnums: Any = (0, 1)) -> float:
    """Of the compiled loss and gradients of 4096 tokens; of a loop, of one turn."""
    targets, weights = jnp.zeros((1, 4096), jnp.int32), jnp.ones((1, 4096))

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return total(hidden, head, targets, weights, 8192, chunk)

    arrays = jax.ShapeDtypeStruct((1, 4096, 64), jnp.float32), jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    analysis = jax.jit(jax.value_and_grad(loss, argnums=argnums)).lower(*arrays).compile().cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def test_the_head_multiplies_three_times_in_chunks() -> None:
    """Forward, and for the gradients of hidden states and head; the nats of each token take a fourth product."""
    assert flops(sum_of_nats, 1024) < 0.8 * flops(by_nats, 1024)


def test_a_frozen_head_has_no_gradient() -> None:
    """XLA drops what nobody reads, the product included."""
    assert flops(sum_of_nats, 4096, 0) < 0.75 * flops(sum_of_nats, 4096)
    assert flops(sum_of_nats, 1024, 0) < 0.75 * flops(sum_of_nats, 1024)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    vocabulary=st.integers(1, 70),
    padding=st.integers(0, 20),
    block=st.sampled_from([8, 32]),
    scale=st.sampled_from([1.0, 100.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_the_kernel_for_gpus_computes_the_formula(
    n: int, vocabulary: int, padding: int, block: int, scale: float, dtype: DTypeName, seed: int
) -> None:
    """With blocks that are longer and shorter than the vocabulary, padding, and logits whose exponentials overflow.
    Without a GPU, the kernel is interpreted; tests/gpu has it compiled."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(n, vocabulary + padding)).astype(np.float32)
    targets, weights = rng.integers(0, vocabulary, n, np.int32), rng.random(n, np.float32)
    tokens = hide_padding(jnp.asarray(logits), vocabulary), jnp.asarray(targets), jnp.asarray(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_kernel, "BLOCK", block)
        found = loss_kernel.nats_and_gradient_by_kernel(*tokens, dtype, interpret=True)
    for ours, expected in zip(found, nats_and_gradient(*tokens, dtype), strict=True):
        assert ours.dtype == expected.dtype
        rtol = 1e-5 if ours.dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), rtol, 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_kernel_for_gpus_hides_no_logit_that_is_no_number(bad: float) -> None:
    logits = jnp.zeros((2, 20)).at[0, 7].set(bad)
    kernel = functools.partial(loss_kernel.nats_and_gradient_by_kernel, dtype=jnp.float32, interpret=True)
    nats, gradient = kernel(logits, jnp.array([3, 3]), jnp.ones(2))
    assert not np.isfinite(nats[0])
    assert np.isnan(gradient[0, 7])
    assert np.isfinite(nats[1])
    assert np.all(np.isfinite(gradient[1]))
