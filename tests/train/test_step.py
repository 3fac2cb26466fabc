"""The step gives the same result on one device, on many, and in microbatches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.train import step as step_module
from gpt_jax.train.objectives import Objective, Sums
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import StepMetrics, TrainState, init_state, make_eval_step, make_train_step
from tests import tiny

CONFIG = dataclasses.replace(tiny.GPT2, vocab_size=61, context_length=16, n_head=2)
BATCH, STEPS, SEED = 16, 5, 3
# Steps large enough for a wrong gradient to show, eps large enough for Adam not to blow up the rounding of tiny ones.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-4)


def run(
    n_devices: int, n_micro: int = 1, model_config: ModelConfig = CONFIG, objective: Objective = next_token
) -> tuple[TrainState, list[StepMetrics]]:
    """Several steps on random batches, the same for every placement."""
    placement = Placement(jax.devices()[:n_devices])
    model = GPT(model_config)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    train_step = placement.jit(
        make_train_step(objective, model, optimizer, schedule, SEED, placement.axis_name), donate=True
    )
    state = placement.make(lambda: init_state(model, optimizer, SEED))
    rng, metrics = np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, CONFIG.context_length + 1), dtype=np.int32)
        state, m = train_step(state, placement.split(Batch(tokens), n_micro))
        jax.block_until_ready(state)
        metrics.append(jax.device_get(m))
    return jax.device_get(state), metrics


def assert_same(ours: tuple[TrainState, list[StepMetrics]], expected: tuple[TrainState, list[StepMetrics]]) -> None:
    """Equal within 1e-5: loss and gradient norm of every step, parameters and optimizer state after the last."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, list[StepMetrics]]:
    return run(1)


@pytest.mark.parametrize(
    ("n_devices", "n_micro"),
    [*(pytest.param(*n, marks=pytest.mark.exhaustive) for n in ((8, 1), (1, 4), (2, 4))), (4, 2)],
)
def test_devices_and_microbatches_agree(one_device: Any, n_devices: int, n_micro: int) -> None:
    ours = run(n_devices, n_micro)
    assert_same(ours, one_device)
    assert int(ours[0].step) == STEPS
    assert not np.allclose(ours[0].params["tokens_VD"], run_init()["tokens_VD"], atol=1e-3)  # Something was learnt.


@functools.cache
def run_init() -> Any:
    return jax.jit(lambda: init_state(GPT(CONFIG), make_optimizer(OPTIMIZER, STEPS), SEED).params)()


def loss_and_grad_norm(loss: Callable[[Any], jax.Array], params: Any) -> tuple[jax.Array, jax.Array]:
    """A loss of parameters, and the norm of its gradient."""

    def compute(params: Any) -> tuple[jax.Array, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        return value, optax.tree.norm(grads)

    return jax.jit(compute)(params)


def test_dropout_does_not_depend_on_devices_and_microbatches(one_device: Any) -> None:
    config = dataclasses.replace(CONFIG, dropout=0.2)
    alone = run(1, 1, config)
    assert_same(run(2, 2, config), alone)
    assert not np.allclose([m.loss for m in alone[1]], [m.loss for m in one_device[1]], atol=1e-3)


def test_dropout_is_drawn_anew_for_every_seed_and_step() -> None:
    def objective(model: GPT, params: Any, batch: Batch, keys_B: Any) -> Sums:
        one = jnp.float32(1)
        return Sums(0 * jnp.sum(params["tokens_VD"]), one, {"drawn": (jax.random.uniform(keys_B[0]), one)}, {})

    model, optimizer = GPT(dataclasses.replace(CONFIG, dropout=0.2)), make_optimizer(OPTIMIZER, STEPS)
    batch = Batch(np.zeros((1, 2, CONFIG.context_length + 1), np.int32))
    drawn = set()
    for seed in (0, 1):
        schedule = learning_rate_schedule(OPTIMIZER, STEPS)
        train_step = jax.jit(make_train_step(objective, model, optimizer, schedule, seed, None))
        state = TrainState(jnp.int32(0), params := run_init(), optimizer.init(params), {})
        for _ in range(3):
            state, metrics = train_step(state, batch)
            drawn.add(float(metrics.logged["drawn"]))
    assert len(drawn) == 2 * 3


def test_the_rate_that_is_logged_is_the_one_that_was_used(one_device: Any) -> None:
    """Step s has the schedule's rate at s, counted from 0, which is that of the optimizer's own count."""
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    np.testing.assert_allclose([m.learning_rate for m in one_device[1]], [schedule(s) for s in range(STEPS)], rtol=1e-6)


@pytest.mark.parametrize("forgotten", ["gradients", "everything"])
def test_a_forgotten_sum_over_devices_is_noticed(
    one_device: Any, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    def no_sum(axis_name: str | None, x: Any) -> Any:
        if forgotten == "gradients":
            return jax.lax.psum(x[0], axis_name), x[1]
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

    loss, grad_norm = loss_and_grad_norm(mean_loss, params)
    np.testing.assert_allclose(one_device[1][0].loss, loss, rtol=1e-5)
    np.testing.assert_allclose(one_device[1][0].grad_norm, grad_norm, rtol=1e-5)


@pytest.mark.parametrize("n_devices", [1, 4])
def test_evaluation_counts_only_what_is_not_masked(rng: np.random.Generator, n_devices: int) -> None:
    placement = Placement(jax.devices()[:n_devices])
    model, params = GPT(CONFIG), run_init()
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 17), dtype=np.int32)
    mask = rng.random((8, 16)) < 0.5
    eval_step = placement.jit(make_eval_step(next_token, model, placement.axis_name), donate=False)
    total, count, *_ = eval_step(params, placement.split(Batch(tokens, mask)))

    @jax.jit
    def losses(params: Any) -> jax.Array:
        logits = forward(model, params, jnp.asarray(tokens[:, :-1])) @ params["tokens_VD"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:]))

    assert int(count) == mask.sum()
    np.testing.assert_allclose(total, np.sum(np.asarray(losses(params))[mask]), rtol=1e-5)


def some_targets(step: int) -> Batch:
    """A batch of which about a third of the targets count, of the last half of the rows none."""
    rng = np.random.default_rng(step)
    mask = rng.random((BATCH, CONFIG.context_length)) < 0.3
    mask[BATCH // 2 :] = False
    return Batch(rng.integers(0, CONFIG.vocab_size, (BATCH, CONFIG.context_length + 1), dtype=np.int32), mask)


@functools.cache
def first_step(n_devices: int, n_micro: int, objective: Objective) -> tuple[Placement, Any, TrainState]:
    """A placement, a step on it, and the state after the step that comes first."""
    placement = Placement(jax.devices()[:n_devices])
    model, optimizer = GPT(CONFIG), make_optimizer(OPTIMIZER, STEPS)
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    step = placement.jit(
        make_train_step(objective, model, optimizer, schedule, SEED, placement.axis_name), donate=False
    )
    state = placement.make(lambda: init_state(model, optimizer, SEED))
    return placement, step, step(state, placement.split(some_targets(0), n_micro))[0]


def step_on(n_devices: int, n_micro: int, batch: Batch, objective: Objective = next_token) -> Any:
    """The state before a step that follows another, and the state and metrics after it."""
    placement, step, before = first_step(n_devices, n_micro, objective)
    return jax.device_get((before, *step(before, placement.split(batch, n_micro))))


def test_only_targets_that_count_are_learnt() -> None:
    """On devices and microbatches of which half have none: the loss and the gradient of the mean over those that do."""
    batch = some_targets(1)
    before, after, metrics = step_on(1, 1, batch)

    def mean_loss(params: Any) -> jax.Array:
        logits = forward(GPT(CONFIG), params, jnp.asarray(batch.tokens[:, :-1])) @ params["tokens_VD"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.tokens[:, 1:]))
        return losses.mean(where=jnp.asarray(batch.mask))

    loss, grad_norm = loss_and_grad_norm(mean_loss, before.params)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, grad_norm, rtol=1e-5)
    ours = step_on(2, 2, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, (before, after, metrics))


@pytest.mark.parametrize(("n_devices", "n_micro"), [(1, 1), (2, 2)])
def test_a_batch_without_a_target_changes_nothing(n_devices: int, n_micro: int) -> None:
    """Though there are momentum and weight decay by then; and nothing is NaN."""
    tokens, mask, *_ = some_targets(1)
    before, after, metrics = step_on(n_devices, n_micro, Batch(tokens, np.zeros_like(mask)))
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])
    assert (int(before.step), int(after.step)) == (1, 2)
    assert (float(metrics.loss), float(metrics.grad_norm)) == (0, 0)


@pytest.mark.parametrize("counts", ["none", "some"])
def test_a_target_that_does_not_count_may_be_anything(counts: str) -> None:
    """Also an id that the model does not have, whose loss is infinite."""
    tokens, mask, *_ = some_targets(1)
    mask = (
        np.zeros_like(mask) if counts == "none" else np.where(np.arange(mask.shape[1]) < mask.shape[1] - 1, mask, False)
    )
    unknown = tokens.copy()
    unknown[:, -1] = 10**6
    ours, expected = (step_on(1, 1, Batch(ids, mask)) for ids in (unknown, tokens))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_what_an_objective_logs_is_divided_after_it_is_added_up() -> None:
    """Over microbatches and devices, each value by its own denominator; one that is 0 gives 0."""

    def objective(model: GPT, params: Any, batch: Batch, keys_B: Any) -> Sums:
        targets = batch.tokens[:, 1:].astype(jnp.float32)
        even = targets % 2 == 0
        n_even = jnp.sum(even, dtype=jnp.float32)
        logged = {
            "even": (n_even, jnp.float32(even.size)),
            "mean_even": (jnp.sum(targets, where=even), n_even),
            "nothing": (jnp.float32(0), jnp.float32(0)),
        }
        return Sums(jnp.sum(params["tokens_VD"][batch.tokens]), jnp.float32(batch.tokens.size), logged, {})

    batch = some_targets(1)
    targets = batch.tokens[:, 1:]
    for n_devices, n_micro in [(1, 1), (2, 4)]:
        logged = step_on(n_devices, n_micro, batch, objective)[2].logged
        np.testing.assert_allclose(logged["even"], (targets % 2 == 0).mean(), rtol=1e-6)
        np.testing.assert_allclose(logged["mean_even"], targets[targets % 2 == 0].mean(), rtol=1e-6)
        assert logged["nothing"] == 0
