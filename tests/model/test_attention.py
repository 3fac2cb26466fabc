import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model.attention import masked_attention
from gpt_jax.model.backend import fallback, resolve, resolved_to
from gpt_jax.model.kernels import causal_by_blocks, causal_by_mask, causal_by_splash
from gpt_jax.runtime import Hardware, hardware


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
A100, H100 = Hardware("gpu", "8.0"), Hardware("gpu", "9.0")
T4, MI300, MI50 = Hardware("gpu", "7.5"), Hardware("gpu", "gfx942", cudnn=0), Hardware("gpu", "gfx906", cudnn=0)


@pytest.mark.parametrize(
    ("on", "changes", "dtype", "attention", "reason"),
    [
        ("cpu", {}, "float32", "block_causal", ""),
        (A100, {}, "bfloat16", "cudnn", ""),
        (A100, {"dtype": "float32"}, "float32", "xla", "not cudnn: it computes in bfloat16, not model.dtype = float32"),
        (A100, {"dropout": 0.1}, "bfloat16", "xla", "not cudnn: it does not drop attention weights, and model.dropout"),
        (A100, {"d_head": 136}, "bfloat16", "xla", "heads of a width of 128 at most, in steps of 8, not 136"),
        (H100, {"d_head": 256}, "bfloat16", "cudnn", ""),
        (H100, {"d_head": 264}, "bfloat16", "xla", "heads of a width of 256 at most, in steps of 8, not 264"),
        (H100, {"d_head": 100}, "bfloat16", "xla", "in steps of 8, not 100"),
        (H100, {"context_length": 1001}, "bfloat16", "cudnn", ""),  # The kernel gets an even length.
        (H100, {"attention": "xla"}, "bfloat16", "xla", ""),
        (H100._replace(cudnn=0), {}, "bfloat16", "xla", "not cudnn: it needs cuDNN, which JAX does not find"),
        (Hardware("gpu", "10.3", 91000), {}, "bfloat16", "xla", "it needs cuDNN 9.11 or later"),
        (Hardware("gpu", "10.3", 91100), {}, "bfloat16", "cudnn", ""),
        (T4, {}, "float32", "xla", "it needs a GPU of compute capability 8.0 (Ampere) or more, and this one has 7.5"),
        (T4, {"dtype": "bfloat16"}, "bfloat16", "xla", "of compute capability 8.0"),
        (MI300, {}, "bfloat16", "xla", "not cudnn: it needs an NVIDIA GPU, and this is another (gfx942)"),
        (MI50, {}, "float32", "xla", "it needs an NVIDIA GPU"),
        ("tpu", {}, "bfloat16", "splash", ""),
        ("tpu", {"context_length": 100}, "bfloat16", "xla", "not splash: it needs a context_length in steps of 128"),
        ("tpu", {"attention": "xla"}, "bfloat16", "xla", ""),
    ],
)
def test_auto_takes_the_fastest_that_can_run(
    on: Hardware | str, changes: dict, dtype: str, attention: str, reason: str
) -> None:
    """And says why, when it is not the fastest of all."""
    on = Hardware(on) if isinstance(on, str) else on
    resolved = resolve(dataclasses.replace(CONFIG, **changes), on)
    assert (resolved.dtype, resolved.attention) == (dtype, attention)
    assert reason in fallback(resolved, on)
    assert bool(fallback(resolved, on)) == bool(reason)
    assert (f"{attention} (not " in resolved_to(resolved, on)) == bool(reason)
    assert ("does not multiply bfloat16" in resolved_to(resolved, on)) == (on in (T4, MI50) and not changes)


@pytest.mark.parametrize(
    ("platform", "told", "version", "expected"),
    [
        ("cpu", None, None, Hardware("cpu")),
        ("tpu", None, None, Hardware("tpu")),
        ("gpu", "9.0", 91002, Hardware("gpu", "9.0", 91002)),
        ("cuda", "7.5", 91002, Hardware("gpu", "7.5", 91002)),
        ("rocm", "gfx90a", None, Hardware("gpu", "gfx90a", 0)),
        ("gpu", None, None, Hardware("gpu", "", 0)),  # Of a maker whose plugin tells nothing.
    ],
)
def test_the_hardware_of_a_device(
    platform: str, told: str | None, version: int | None, expected: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = SimpleNamespace(cudnn_get_version=lambda: version) if version else None
    monkeypatch.setattr("jax._src.lib.cuda_versions", versions)
    device: Any = SimpleNamespace(platform=platform, **({"compute_capability": told} if told else {}))
    assert hardware(device) == expected


@pytest.mark.parametrize(
    ("flags", "deterministic"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops --xla_dump_to=x", True),
        ("--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops=1", True),
        ("--xla_gpu_deterministic_ops=false", False),
    ],
)
def test_flags_for_deterministic_programs(flags: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    device: Any = SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert hardware(device).deterministic == deterministic


@pytest.mark.parametrize(
    ("on", "changes", "attention"),
    [
        ("cpu", {}, "block_causal"),
        ("cpu", {"dropout": 0.1}, "xla"),
        (H100, {}, "block_causal"),
        ("tpu", {"context_length": 1024}, "splash"),
        ("tpu", {"context_length": 128 * 3}, "block_causal"),
    ],
)
def test_auto_takes_one_that_divides_sequences(on: Hardware | str, changes: dict, attention: str) -> None:
    assert resolve(dataclasses.replace(CONFIG, **changes), on, context=2).attention == attention


@pytest.mark.parametrize(
    ("on", "changes", "reason"),
    [
        (H100, {"attention": "cudnn"}, "does not divide sequences, and parallel.context = 2"),
        ("tpu", {"attention": "splash", "context_length": 384}, "in steps of 128 x parallel.context 2, not 384"),
        ("cpu", {"attention": "block_causal", "dropout": 0.1}, "with parallel.context = 2 it does not drop weights"),
    ],
)
def test_what_cannot_divide_sequences_is_refused(on: Hardware | str, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(dataclasses.replace(CONFIG, **changes), on, context=2)


@pytest.mark.parametrize(
    ("on", "changes", "reason"),
    [
        ("cpu", {"attention": "cudnn"}, "needs an NVIDIA GPU, and this is cpu"),
        (MI300, {"attention": "cudnn"}, "needs an NVIDIA GPU, and this is another"),
        (T4, {"attention": "cudnn", "dtype": "bfloat16"}, "compute capability 8.0"),
        (A100, {"attention": "cudnn", "dtype": "float32"}, "computes in bfloat16"),
        (A100, {"attention": "cudnn", "d_model": 512}, "width of 128 at most"),
        (A100, {"attention": "cudnn", "dropout": 0.1}, "does not drop attention weights"),
        (
            A100._replace(deterministic=True),
            {"attention": "cudnn", "dtype": "bfloat16"},
            "ask for deterministic programs",
        ),
        (A100, {"attention": "splash"}, "needs a TPU, and this is gpu"),
        ("tpu", {"attention": "splash", "context_length": 100}, "in steps of 128"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(on: Hardware | str, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(dataclasses.replace(CONFIG, **changes), on)


def test_splash_says_which_lengths_it_takes(rng: np.random.Generator) -> None:
    """Where it was resolved for another length than it is given."""
    q, k, v = random_qkv(rng, 1, 200, 1, 1, 64)
    with pytest.raises(ValueError, match="Splash attends over sequences in steps of 128 tokens, not 200"):
        causal_by_splash(q, k, v, 0)
