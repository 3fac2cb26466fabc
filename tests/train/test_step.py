"""The step gives the same result on one device, on many, and in microbatches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.model.gpt import GPT, forward
from gpt_jax.placement import Placement
from gpt_jax.train import step as step_module
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import StepMetrics, TrainState, init_state, make_eval_step, make_train_step

CONFIG = ModelConfig(
    vocab_size=61, context_length=16, n_layer=2, n_head=2, d_model=32, dtype="float32", attention="block_causal"
)
BATCH, STEPS, SEED = 16, 5, 3
# Steps large enough for a wrong gradient to show, eps large enough for Adam not to blow up the rounding of tiny ones.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-4)


def run(n_devices: int, n_micro: int = 1, model_config: ModelConfig = CONFIG) -> tuple[TrainState, list[StepMetrics]]:
    """Several steps on random batches, the same for every placement."""
    placement = Placement(jax.devices()[:n_devices])
    model = GPT(model_config)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    train_step = placement.jit(
        make_train_step(model, optimizer, schedule, SEED, placement.axis_name), n_batch_args=1, donate=True
    )
    state = placement.make(lambda: init_state(model, optimizer, SEED))
    rng, metrics = np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, CONFIG.context_length + 1), dtype=np.int32)
        state, m = train_step(state, placement.split(tokens, n_micro))
        jax.block_until_ready(state)
        metrics.append(jax.device_get(m))
    return jax.device_get(state), metrics


def assert_same(ours: tuple[TrainState, list[StepMetrics]], expected: tuple[TrainState, list[StepMetrics]]) -> None:
    """Equal within 1e-5: loss and gradient norm of every step, parameters and optimizer state after the last."""
    np.testing.assert_allclose(np.array(ours[1]), np.array(expected[1]), rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours[0], expected[0])


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, list[StepMetrics]]:
    return run(1)


@pytest.mark.parametrize(("n_devices", "n_micro"), [(8, 1), (1, 4), (2, 4), (4, 2)])
def test_devices_and_microbatches_agree(one_device: Any, n_devices: int, n_micro: int) -> None:
    ours = run(n_devices, n_micro)
    assert_same(ours, one_device)
    assert int(ours[0].step) == STEPS
    assert not np.allclose(ours[0].params["tokens_VD"], run_init()["tokens_VD"], atol=1e-3)  # Something was learnt.


def run_init() -> Any:
    return init_state(GPT(CONFIG), make_optimizer(OPTIMIZER, STEPS), SEED).params


def test_dropout_does_not_depend_on_devices_and_microbatches() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.2)
    alone = run(1, 1, config)
    assert_same(run(2, 2, config), alone)
    assert not np.allclose(np.array(alone[1]), np.array(run(1)[1]), atol=1e-3)


@pytest.mark.parametrize("forgotten", ["gradients", "everything"])
def test_a_forgotten_sum_over_devices_is_noticed(
    one_device: Any, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    def no_sum(axis_name: str | None, x: Any) -> Any:
        if forgotten == "gradients":
            return *jax.lax.psum(x[:2], axis_name), x[2]
        return x

    monkeypatch.setattr(step_module, "sum_over", no_sum)
    with pytest.raises(AssertionError):
        assert_same(run(8), one_device)


def test_gradient_accumulation_equals_the_gradient_of_the_mean_loss(one_device: Any) -> None:
    """The first step's loss and gradient norm, against differentiating the textbook formula."""
    model = GPT(CONFIG)
    params = run_init()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, CONFIG.context_length + 1), np.int32)

    def mean_loss(params: Any) -> jax.Array:
        logits = forward(model, params, jnp.asarray(tokens[:, :-1])) @ params["tokens_VD"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:])).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    np.testing.assert_allclose(one_device[1][0].loss, loss, rtol=1e-5)
    np.testing.assert_allclose(one_device[1][0].grad_norm, optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize("n_devices", [1, 4])
def test_evaluation_counts_only_what_is_not_masked(rng: np.random.Generator, n_devices: int) -> None:
    placement = Placement(jax.devices()[:n_devices])
    model, params = GPT(CONFIG), run_init()
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 17), dtype=np.int32)
    mask = rng.random((8, 16)) < 0.5
    eval_step = placement.jit(make_eval_step(model, placement.axis_name), n_batch_args=2, donate=False)
    total, count = eval_step(params, placement.split(tokens), placement.split(mask))
    logits = forward(model, params, jnp.asarray(tokens[:, :-1])) @ params["tokens_VD"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:]))
    assert int(count) == mask.sum()
    np.testing.assert_allclose(total, np.sum(np.asarray(losses)[mask]), rtol=1e-5)
