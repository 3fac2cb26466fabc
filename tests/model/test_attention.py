import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.attention import masked_attention
from gpt_jax.model.backend import resolve
from gpt_jax.model.kernels import causal_by_blocks, causal_by_mask, causal_by_splash


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask_BTS: np.ndarray) -> np.ndarray:
    """Attention in NumPy and float64, a head and a query at a time."""
    B, T, H, K = q.shape
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[2])
            for t in range(T):
                seen = mask_BTS[b, t]
                scores = k[b, seen, g].astype(np.float64) @ q[b, t, h] / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


def random_qkv(rng: np.random.Generator, B: int, T: int, H: int, G: int, K: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, K)), jnp.float32) for n in (H, G, G))


@pytest.mark.parametrize("n_groups", [4, 2, 1])
def test_masked_attention_equals_numpy(rng: np.random.Generator, n_groups: int) -> None:
    q, k, v = random_qkv(rng, 2, 9, 4, n_groups, 8)
    mask = rng.random((2, 9, 9)) < 0.5
    mask[:, :, 0] = True
    expected = reference(np.asarray(q), np.asarray(k), np.asarray(v), mask)
    np.testing.assert_allclose(jax.jit(masked_attention)(q, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("n_groups", [4, 2])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 300])
def test_a_window_is_the_last_tokens(rng: np.random.Generator, n_groups: int, window: int) -> None:
    """Token t sees tokens t - window + 1 to t."""
    q, k, v = random_qkv(rng, 1, 150, 4, n_groups, 8)
    t, s = np.mgrid[:150, :150]
    seen = (s <= t) & ((t - s < window) | (window == 0))
    expected = reference(np.asarray(q), np.asarray(k), np.asarray(v), seen[None])
    for attend in (causal_by_mask, causal_by_blocks):
        ours = jax.jit(attend, static_argnums=(3, 4))(q, k, v, window, 0.0, None)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, 30, 100])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 600])
def test_blocks_equal_the_full_mask(rng: np.random.Generator, T: int, window: int) -> None:
    qkv = random_qkv(rng, 2, T, 2, 2, 8)

    def value_and_grads(attend):  # type: ignore[no-untyped-def]
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(jnp.sin(attend(*qkv, window, 0.0, None)))))(qkv)

    for blocks, full in zip(
        jax.tree.leaves(value_and_grads(causal_by_blocks)),
        jax.tree.leaves(value_and_grads(causal_by_mask)),
        strict=True,
    ):
        np.testing.assert_allclose(blocks, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_groups", "window"), [(4, 0), (2, 0), (1, 100), (4, 70)])
def test_splash_kernel_equals_the_full_mask(rng: np.random.Generator, n_groups: int, window: int) -> None:
    """The TPU kernel, interpreted on CPU."""
    q, k, v = random_qkv(rng, 1, 256, 4, n_groups, 64)
    splash = jax.jit(lambda q, k, v: causal_by_splash(q, k, v, window, interpret=True))(q, k, v)
    full = jax.jit(lambda q, k, v: causal_by_mask(q, k, v, window, 0.0, None))(q, k, v)
    np.testing.assert_allclose(splash, full, rtol=1e-4, atol=1e-5)


def test_a_token_sees_no_later_one(rng: np.random.Generator) -> None:
    q, k, v = random_qkv(rng, 1, 100, 2, 2, 8)
    attend = jax.jit(lambda q, k, v: causal_by_blocks(q, k, v, 0, 0.0, None))
    before = attend(q, k, v)
    after = attend(q, k.at[:, 70:].set(9.0), v.at[:, 70:].set(9.0))
    np.testing.assert_array_equal(before[:, :70], after[:, :70])
    assert not np.allclose(before[:, 70:], after[:, 70:])


def test_attention_weights_are_dropped_a_sequence_at_a_time(rng: np.random.Generator) -> None:
    q, k, v = random_qkv(rng, 3, 80, 2, 2, 8)
    keys_B = jax.random.split(jax.random.key(1), 3)
    attend = jax.jit(lambda q, k, v, keys_B: causal_by_blocks(q, k, v, 0, 0.5, keys_B))
    together = attend(q, k, v, keys_B)
    for b in range(3):
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], keys_B[b : b + 1])
        np.testing.assert_allclose(together[b], alone[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(together, causal_by_mask(q, k, v, 0, 0.0, None))


CONFIG = ModelConfig(vocab_size=64, context_length=256, n_layer=1, n_head=2, d_model=128)


@pytest.mark.parametrize(
    ("platform", "changes", "dtype", "attention"),
    [
        ("cpu", {}, "float32", "block_causal"),
        ("gpu", {}, "bfloat16", "cudnn"),
        ("gpu", {"dtype": "float32"}, "float32", "xla"),
        ("gpu", {"dropout": 0.1}, "bfloat16", "xla"),
        ("tpu", {}, "bfloat16", "splash"),
        ("tpu", {"context_length": 100}, "bfloat16", "xla"),
        ("tpu", {"attention": "xla"}, "bfloat16", "xla"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(platform: str, changes: dict, dtype: str, attention: str) -> None:
    resolved = resolve(dataclasses.replace(CONFIG, **changes), platform)
    assert (resolved.dtype, resolved.attention) == (dtype, attention)


@pytest.mark.parametrize(
    ("platform", "changes", "attention"),
    [
        ("cpu", {}, "block_causal"),
        ("cpu", {"dropout": 0.1}, "xla"),
        ("gpu", {}, "block_causal"),
        ("tpu", {"context_length": 1024}, "splash"),
        ("tpu", {"context_length": 128 * 3}, "block_causal"),
    ],
)
def test_auto_takes_one_that_divides_sequences(platform: str, changes: dict, attention: str) -> None:
    assert resolve(dataclasses.replace(CONFIG, **changes), platform, context=2).attention == attention


@pytest.mark.parametrize(
    ("platform", "changes", "reason"),
    [
        ("gpu", {"attention": "cudnn"}, "does not divide sequences, and parallel.context = 2"),
        ("tpu", {"attention": "splash", "context_length": 384}, "in steps of 128 x parallel.context 2, not 384"),
        ("cpu", {"attention": "block_causal", "dropout": 0.1}, "with parallel.context = 2 it does not drop weights"),
    ],
)
def test_what_cannot_divide_sequences_is_refused(platform: str, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(dataclasses.replace(CONFIG, **changes), platform, context=2)


@pytest.mark.parametrize(
    ("platform", "changes", "reason"),
    [
        ("cpu", {"attention": "cudnn"}, "needs an NVIDIA GPU, and this is cpu"),
        ("gpu", {"attention": "cudnn", "dtype": "float32"}, "computes in bfloat16"),
        ("gpu", {"attention": "cudnn", "d_model": 512}, "width of 128 at most"),
        ("gpu", {"attention": "cudnn", "dropout": 0.1}, "does not drop attention weights"),
        ("gpu", {"attention": "splash"}, "needs a TPU, and this is gpu"),
        ("tpu", {"attention": "splash", "context_length": 100}, "in steps of 128"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(platform: str, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(dataclasses.replace(CONFIG, **changes), platform)
