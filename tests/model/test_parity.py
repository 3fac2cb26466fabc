"""The model against Hugging Face's GPT-2 in PyTorch, with the same random weights. Needs the extra `parity`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import AttentionName
from gpt_jax.model.cache import init_cache
from gpt_jax.model.forward import forward, forward_cached
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_logits
from gpt_jax.model.loss import nats_in_chunks
from gpt_jax.model.stack import unstack
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CONFIG = dataclasses.replace(tiny.GPT2, vocab_size=523, context_length=128, n_layer=3, d_model=64, attention="xla")


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    """A GPT-2 whose every weight is random: biases and norms too, which start as 0 and 1."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_positions=CONFIG.context_length,
            n_embd=CONFIG.d_model,
            n_layer=CONFIG.n_layer,
            n_head=CONFIG.n_head,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def to_ours(weights: dict[str, np.ndarray]) -> Params:
    """Hugging Face's names to our tree: layers stacked, the columns of c_attn regrouped from (q, k, v) to heads."""
    L, H, K, D = CONFIG.n_layer, CONFIG.n_head, CONFIG.head_dim, CONFIG.d_model

    def stack(name: str) -> np.ndarray:
        return np.stack([weights[f"transformer.h.{i}.{name}"] for i in range(L)])

    def norm(name: str) -> Params:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    def linear(name: str) -> Params:
        return {"kernel": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    qkv = linear("attn.c_attn")
    qkv["kernel"] = qkv["kernel"].reshape(L, D, 3, H, K).swapaxes(2, 3).reshape(L, D, 3 * D)
    qkv["bias"] = qkv["bias"].reshape(L, 3, H, K).swapaxes(1, 2).reshape(L, 3 * D)
    return {
        "tokens_VD": weights["transformer.wte.weight"],
        "positions_TD": weights["transformer.wpe.weight"],
        "layers": {
            "norm_1": norm("ln_1"),
            "attention": {"qkv": qkv, "out": linear("attn.c_proj")},
            "norm_2": norm("ln_2"),
            "mlp": {"up": linear("mlp.c_fc"), "down": linear("mlp.c_proj")},
        },
        "final_norm": {"scale": weights["transformer.ln_f.weight"], "bias": weights["transformer.ln_f.bias"]},
    }


@pytest.fixture(scope="module")
def params(hugging_face: Any) -> Params:
    weights = to_ours({name: p.detach().numpy() for name, p in hugging_face.named_parameters()})
    return jax.tree.map(jnp.asarray, weights)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, CONFIG.context_length))


@pytest.fixture(scope="module")
def expected_logits(hugging_face: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hugging_face(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("attention", ["xla", "block_causal"])
def test_logits_equal_hugging_face(
    params: Params, tokens: np.ndarray, expected_logits: np.ndarray, attention: AttentionName
) -> None:
    """Within 1e-4 in float32, over a full window."""
    model = GPT(dataclasses.replace(CONFIG, attention=attention))
    hidden_BTD = jax.jit(lambda params: forward(model, params, jnp.asarray(tokens)))(params)
    ours = np.stack([head_logits(hidden_TD, params["tokens_VD"], CONFIG.vocab_size) for hidden_TD in hidden_BTD])
    assert np.abs(expected_logits).max() > 1  # Not all alike, which would compare equal to anything.
    np.testing.assert_allclose(ours, expected_logits, atol=1e-4, rtol=0)


def test_cached_decoding_equals_hugging_face(params: Params, tokens: np.ndarray, expected_logits: np.ndarray) -> None:
    """The same, token by token after a prefill of 100."""
    model = GPT(CONFIG)
    unstacked = {**params, "layers": unstack(params["layers"], CONFIG.n_layer)}
    step = jax.jit(lambda tokens, cache, start: forward_cached(model, unstacked, tokens, cache, start))
    hidden, cache = step(jnp.asarray(tokens[:, :100]), init_cache(CONFIG, 3, 128), jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(
        head_logits(hidden[:, -1], params["tokens_VD"], CONFIG.vocab_size), expected_logits[:, 99], atol=1e-4, rtol=0
    )
    for t in range(100, 128):
        hidden, cache = step(jnp.asarray(tokens[:, t : t + 1]), cache, jnp.full(3, t, jnp.int32))
        ours = head_logits(hidden[:, 0], params["tokens_VD"], CONFIG.vocab_size)
        np.testing.assert_allclose(ours, expected_logits[:, t], atol=1e-4, rtol=0)


def test_loss_and_gradients_equal_hugging_face(hugging_face: Any, params: Params, tokens: np.ndarray) -> None:
    """The loss within 1e-5, the gradient of every parameter within 1e-4."""
    hugging_face.zero_grad()
    expected = hugging_face(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    expected.backward()
    expected_grads = to_ours({name: p.grad.numpy() for name, p in hugging_face.named_parameters()})
    model = GPT(CONFIG)

    def mean_loss(params: Params) -> jax.Array:
        inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
        hidden_BTD = forward(model, params, inputs)
        return nats_in_chunks(hidden_BTD, params["tokens_VD"], targets, CONFIG.vocab_size, 64).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0), grads, expected_grads)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-2
