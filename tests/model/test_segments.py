"""Documents that are packed into a row see nothing of each other, whatever computes their attention."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import AttentionName, ModelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import Params
from gpt_jax.model.kernels import causal_attention, causal_by_blocks, causal_by_mask, causal_by_splash
from gpt_jax.train.objectives.next_token import next_token
from tests.model.test_attention import random_qkv, reference
from tests.model.test_gpt import CONFIG, GEMMA, LLAMA, make
from tests.packed import random_batch, random_documents

Attend = Callable[..., jax.Array]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Computes what cuDNN is asked for by XLA; the arguments of each call."""
    calls, plain = [], jax.nn.dot_product_attention

    def spy(*qkv: jax.Array, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        calls.append({"shape": qkv[0].shape, **options})
        return plain(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return calls


def by_name(name: str, window: int) -> Attend:
    """Attention of q, k, v and segments_BT by a backend; Splash is interpreted."""
    if name == "splash":
        return lambda q, k, v, segments: causal_by_splash(q, k, v, window, segments, interpret=True)
    config = ModelConfig(attention=name)  # type: ignore[arg-type]
    return lambda q, k, v, segments: causal_attention(q, k, v, config, window, segments_BT=segments)


def seen(segments_BT: np.ndarray, window: int) -> np.ndarray:
    """Which keys each query sees, bool (B, T, T), token by token."""
    B, T = segments_BT.shape
    mask = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(max(0, t - window + 1) if window else 0, t + 1):
                mask[b, t, s] = segments_BT[b, s] == segments_BT[b, t]
    return mask


@pytest.mark.parametrize(("n_groups", "window"), [(4, 0), (2, 70)])
@pytest.mark.parametrize("name", ["xla", "block_causal", "cudnn", "splash"])
def test_a_query_sees_its_own_segment_alone(
    rng: np.random.Generator, on_cpu: list[dict[str, Any]], name: str, n_groups: int, window: int
) -> None:
    """Against NumPy; and the gradients against those of the plain mask."""
    q, k, v = random_qkv(rng, 2, 256, 4, n_groups, 64)
    segments, _ = random_documents(rng, 2, 256)
    out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def value_and_grads(attend: Attend) -> Any:
        def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = attend(*qkv, jnp.asarray(segments))
            return jnp.vdot(found, out), found

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    grads, found = value_and_grads(by_name(name, window))
    expected = reference(np.asarray(q), np.asarray(k), np.asarray(v), seen(segments, window))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    by_mask = functools.partial(causal_by_mask, window=window, dropout_rate=0.0, keys_B=None)
    plain, _ = value_and_grads(lambda q, k, v, segments: by_mask(q, k, v, segments_BT=segments))
    for ours, theirs in zip(grads, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@functools.cache
def both(window: int) -> Attend:
    """Attention in blocks and by the full mask, of the same arrays."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        attends = (causal_by_blocks, causal_by_mask)
        blocks, full = (attend(q, k, v, window, 0.0, None, segments) for attend in attends)
        return blocks, full

    return jax.jit(attend)


@given(st.lists(st.integers(1, 149), max_size=12), st.integers(0, 3), st.sampled_from([0, 1, 30, 200]))
def test_segments_may_begin_anywhere(borders: list[int], n_ids: int, window: int) -> None:
    """In the middle of a block, at its ends, one token long; also where an id comes again after another."""
    rng = np.random.default_rng(0)
    starts = np.bincount(borders, minlength=150) > 0
    segments = np.cumsum(starts)[None] % (n_ids or 1000)
    blocks, full = both(window)(*random_qkv(rng, 1, 150, 2, 1, 8), jnp.asarray(segments, jnp.int32))
    np.testing.assert_allclose(blocks, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [64, 65])
def test_what_cudnn_is_asked_for(rng: np.random.Generator, on_cpu: list[dict[str, Any]], T: int) -> None:
    """An even length, as its backward pass needs; without segments no mask, and with them one of (B, 1, T, T)."""
    q, k, v = random_qkv(rng, 2, T, 2, 2, 8)
    segments, _ = random_documents(rng, 2, T)
    attend = by_name("cudnn", 20)
    whole = attend(q, k, v, None)
    assert on_cpu[0]["mask"] is None
    assert on_cpu[0]["shape"][1] == 64 + T % 2 * 2
    one_document = reference(np.asarray(q), np.asarray(k), np.asarray(v), seen(np.zeros_like(segments), 20))
    np.testing.assert_allclose(whole, one_document, atol=1e-5)
    ours = attend(q, k, v, jnp.asarray(segments))
    mask = on_cpu[1]["mask"]
    assert (mask.shape, mask.dtype) == ((2, 1, 64 + T % 2 * 2, 64 + T % 2 * 2), bool)
    assert on_cpu[1]["shape"][1] == mask.shape[-1]
    assert [(call["is_causal"], call["local_window_size"]) for call in on_cpu] == [(True, (19, 0))] * 2
    expected = reference(np.asarray(q), np.asarray(k), np.asarray(v), seen(segments, 20))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def alone(batch: Batch) -> tuple[Batch, list[np.ndarray]]:
    """The documents of a batch, each at the beginning of a row of its own; and which inputs of its row each one was."""
    tokens, masks, places = [], [], []
    for row in range(len(batch.tokens)):
        for segment in dict.fromkeys(batch.segments[row]):
            (inputs,) = np.nonzero(batch.segments[row] == segment)
            n, T = len(inputs), batch.segments.shape[1]
            tokens.append(np.pad(batch.tokens[row, inputs[0] : inputs[-1] + 2], (0, T - n)))
            masks.append(np.pad(batch.mask[row, inputs], (0, T - n)))
            places.append(inputs)
    return Batch(np.stack(tokens), np.stack(masks)), places


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (CONFIG, "xla"),
        (LLAMA, "block_causal"),
        pytest.param(
            dataclasses.replace(GEMMA, unroll=False, remat="full"), "block_causal", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_packed_row_equals_its_documents_run_alone(
    rng: np.random.Generator, config: ModelConfig, attention: AttentionName
) -> None:
    """Hidden states of every token, and the loss and its gradients over all documents, of every parameter."""
    model, params = make(dataclasses.replace(config, attention=attention, context_length=80))
    batch = random_batch(rng, 2, 80, config.vocab_size)
    documents, places = alone(batch)

    @jax.jit
    def compute(params: Params, batch: Batch) -> Any:
        def total(params: Params) -> Any:
            sums = next_token(model, params, batch, None)
            return sums.numerator, sums.denominator

        hidden_BTD = forward(model, params, batch.tokens[:, :-1], None, batch.segments, batch.positions)
        return hidden_BTD, *jax.value_and_grad(total, has_aux=True)(params)

    packed, (ours, count), grads = compute(params, batch)
    each, (expected, expected_count), expected_grads = compute(params, documents)
    of_documents = np.concatenate([row[: len(inputs)] for row, inputs in zip(np.asarray(each), places, strict=True)])
    np.testing.assert_allclose(packed.reshape(160, -1), of_documents, rtol=1e-4, atol=1e-4)
    assert count == expected_count == batch.mask.sum()
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), grads, expected_grads)
