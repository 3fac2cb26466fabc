import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.loss import nats_BT


def reference(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    peak = logits.max(-1)
    logsumexp = np.log(np.exp(logits - peak[..., None]).sum(-1)) + peak
    return float(((logsumexp - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * mask).sum())


@pytest.mark.parametrize("chunk", [1, 7, 8, 21, 1000])
def test_loss_and_gradient_do_not_depend_on_the_chunk(rng: np.random.Generator, chunk: int) -> None:
    hidden = rng.normal(size=(3, 7, 16)).astype(np.float32)
    head = rng.normal(size=(50, 16)).astype(np.float32)
    targets, mask = jnp.asarray(rng.integers(0, 50, (3, 7))), jnp.asarray(rng.random((3, 7)) < 0.7)

    def loss(hidden: jax.Array, head: jax.Array, chunk: int) -> jax.Array:
        return jnp.sum(nats_BT(hidden, head, targets, head.shape[0], chunk), where=mask)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    total, grads = grad(hidden, head, chunk)
    assert float(total) == pytest.approx(reference(hidden, head, np.asarray(targets), np.asarray(mask)), rel=1e-5)
    for chunked, whole in zip(grads, grad(hidden, head, 10_000)[1], strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-5)


def test_full_logits_never_exist(rng: np.random.Generator) -> None:
    """The compiled gradient needs less memory than the logits of all tokens alone would take."""
    n_tokens, vocabulary, width, chunk = 4096, 8192, 64, 256
    hidden = jnp.zeros((1, n_tokens, width))
    head = jnp.zeros((vocabulary, width))
    targets = jnp.zeros((1, n_tokens), jnp.int32)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return nats_BT(hidden, head, targets, head.shape[0], chunk).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n_tokens * vocabulary * 4 / 4


def test_all_products_of_the_head_multiply_bfloat16(rng: np.random.Generator) -> None:
    hidden = jnp.asarray(rng.normal(size=(1, 8, 16)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.zeros((1, 8), jnp.int32)
    gradients = jax.jit(jax.grad(lambda h, w: nats_BT(h, w, targets, 50, 100).sum(), argnums=(0, 1)))
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
