import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.model.gpt import GPT
from gpt_jax.train.optimizer import is_decayed, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)


def rates(schedule: str, steps: int = 110, **changes: float) -> np.ndarray:
    config = OptimizerConfig(**{**CONFIG.__dict__, "schedule": schedule, **changes})
    return np.array([learning_rate_schedule(config, steps)(step) for step in range(steps)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_rate(schedule: str) -> None:
    lr = rates(schedule)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert np.all(np.diff(lr[9:]) <= 1e-7)
    assert lr[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, rel=1e-5)


def test_shapes_of_the_schedules() -> None:
    np.testing.assert_allclose(
        rates("cosine")[9:], 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(rates("linear")[9:], np.linspace(1, 0.1, 101), rtol=1e-5)
    wsd = rates("wsd")
    assert np.all(wsd[9:88] == 1)
    np.testing.assert_allclose(wsd[87:], np.linspace(1, 0.1, 23), rtol=1e-5)


def test_without_warmup_the_first_step_has_nearly_the_peak() -> None:
    assert rates("cosine", warmup_steps=0)[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_and_embeddings_decay_and_nothing_else(bias: bool) -> None:
    """Decided on the stacked tree, where biases and scales have two dimensions as matrices do."""
    model = GPT(
        ModelConfig(
            vocab_size=7, context_length=4, n_layer=2, n_head=1, d_model=4, bias=bias, dtype="float32", attention="xla"
        )
    )
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decayed in jax.tree_util.tree_leaves_with_path(is_decayed(params))
        if decayed
    }
    layers = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
    assert names == {"tokens_VD", "positions_TD", *(f"layers/{layer}/kernel" for layer in layers)}


def test_heads_and_adapters_decay_and_norms_of_heads_do_not() -> None:
    tree = {"head_VD": 1, "qkv": {"kernel": 1, "bias": 1, "lora_a": 1, "lora_b": 1}, "q_norm": {"scale": 1}}
    no_bias = {"kernel": True, "bias": False, "lora_a": True, "lora_b": True}
    assert is_decayed(tree) == {"head_VD": True, "qkv": no_bias, "q_norm": {"scale": False}}


def test_three_steps_equal_adamw_in_numpy(rng: np.random.Generator) -> None:
    """Clipping, moments, bias correction, decoupled decay and schedule, written out (Loshchilov and Hutter 2019)."""
    c = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=0.5, eps=1e-6)
    params = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    optimizer = make_optimizer(c, steps=6)
    state = optimizer.init(params)
    schedule = learning_rate_schedule(c, 6)
    ours = params
    expected = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in expected.items()}
    v = {k: np.zeros_like(v) for k, v in expected.items()}
    for t in range(1, 4):
        grads = {k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)

        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1, c.clip_norm / norm)
            m[k] = c.beta1 * m[k] + (1 - c.beta1) * g
            v[k] = c.beta2 * v[k] + (1 - c.beta2) * g**2
            direction = (m[k] / (1 - c.beta1**t)) / (np.sqrt(v[k] / (1 - c.beta2**t)) + c.eps)
            decay = c.weight_decay * expected[k] if k == "kernel" else 0
            expected[k] = expected[k] - float(schedule(t - 1)) * (direction + decay)
    for k in params:
        np.testing.assert_allclose(ours[k], expected[k], rtol=1e-4, atol=1e-6)
