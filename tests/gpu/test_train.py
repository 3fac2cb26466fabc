"""Whole steps: in bfloat16 with cuDNN's attention against float32 on CPU, and what they are compiled to."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig, OptimizerConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.runtime import Hardware
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import StepMetrics, TrainState, make_eval_step, make_train_step
from tests.gpu.closeness import ROUNDING
from tests.gpu.models import GPT2, MODELS, in_float32
from tests.tiny import random_params

STEPS = 10
# eps far above the gradients: so the step is proportional to the gradient, and rounding does not become a step of full
# size where the gradient is about zero.
OPTIMIZER = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, weight_decay=0.0)


class Step(NamedTuple):
    """A train step, and what it is called with, on one device."""

    jitted: Any
    state: TrainState
    batch: Batch


def make_step(config: ModelConfig, device: jax.Device, packed: bool = False) -> Step:
    """The step of a model whose parameters all count; the batch may have several documents in a row."""
    model, optimizer, placement = GPT(config), make_optimizer(OPTIMIZER, STEPS), Placement([device])
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    step = make_train_step(next_token, model, optimizer, schedule, 0, placement.axis_name)
    with jax.default_device(jax.devices("cpu")[0]):
        state = jax.jit(lambda params: TrainState(jnp.int32(0), params, optimizer.init(params), {}))(params_of(config))
    batch = batch_of(config.context_length, config.vocab_size, packed)
    return Step(placement.jit(step, donate=False), jax.device_put(state, device), placement.split(batch, 1))


@functools.cache
def params_of(config: ModelConfig) -> Any:
    """Parameters that are the same whatever the model computes in, on CPU."""
    config = in_float32(config)
    with jax.default_device(jax.devices("cpu")[0]):
        return random_params(config)


def batch_of(T: int, vocab_size: int, packed: bool) -> Batch:
    """Four rows of random tokens, of which a third do not count as targets."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (4, T + 1), np.int32)
    mask = rng.random((4, T)) < 0.7
    if not packed:
        return Batch(tokens, mask)
    second = np.arange(T) - np.array([[0], [1], [50], [T - 1]])  # Positions in the second document of each row.
    return Batch(
        tokens, mask, (second >= 0).astype(np.int32), np.where(second < 0, np.arange(T), second).astype(np.int32)
    )


@functools.cache
def expected(name: str, packed: bool) -> tuple[TrainState, StepMetrics]:
    """The state after one step, and its metrics, in float32 on CPU."""
    step = make_step(in_float32(MODELS[name]), jax.devices("cpu")[0], packed)
    return jax.device_get(step.jitted(step.state, step.batch))


STEPS_TO_TAKE = [("gpt2", False), ("gpt2", True), ("llama", False)]


@pytest.mark.parametrize(("name", "packed"), STEPS_TO_TAKE)
def test_a_step_equals_that_in_float32_on_cpu_and_ten_learn(device: jax.Device, name: str, packed: bool) -> None:
    """After one step, the change of each parameter within eight roundings to bfloat16; there are more than that in a
    row from the parameters to the loss and back, but of either sign. The gradient's norm, of all parameters, within
    one, and the loss, a mean over 360 targets, within a quarter."""
    step = make_step(MODELS[name], device, packed)
    compiled = step.jitted.lower(step.state, step.batch).compile()
    state, metrics = compiled(step.state, step.batch)
    assert {x.devices().pop() for x in jax.tree.leaves(state)} == {device}

    expected_state, expected_metrics = expected(name, packed)
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=ROUNDING / 4)
    np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=ROUNDING)
    trees = jax.device_get((state.params, expected_state.params, params_of(MODELS[name])))
    for ours, theirs, before in zip(*map(jax.tree.leaves, trees), strict=True):
        assert np.linalg.norm(ours - theirs) <= 8 * ROUNDING * np.linalg.norm(theirs - before)

    losses = [float(metrics.loss)]
    for _ in range(STEPS - 1):
        state, metrics = compiled(state, step.batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert losses == sorted(losses, reverse=True)
    if device.platform != "cpu":
        forward, backward = cudnn_calls(compiled.as_text())
        assert forward == backward == MODELS[name].n_layer


def cudnn_calls(program: str) -> tuple[int, int]:
    """How often a program calls cuDNN's attention, forward and backward; in StableHLO or HLO."""
    names = re.findall(r'(?:custom_call @|custom_call_target=")(__cudnn\$fmha\w+)', program)
    backward = sum("Backward" in name for name in names)
    return len(names) - backward, backward


@pytest.mark.parametrize(("name", "packed"), STEPS_TO_TAKE)
def test_a_step_asks_for_cudnn_and_multiplies_in_bfloat16(as_if_for_an_h100: None, name: str, packed: bool) -> None:
    """As it is lowered for a GPU, which takes none: each layer calls cuDNN forward and backward, and all matrices that
    are multiplied are bfloat16."""
    step = make_step(MODELS[name], jax.devices("cpu")[0], packed)
    program = step.jitted.trace(step.state, step.batch).lower(lowering_platforms=("cuda",)).as_text()
    assert cudnn_calls(program) == (MODELS[name].n_layer, MODELS[name].n_layer)
    calls = re.findall(r"custom_call @__cudnn.* : \((.*)\) ->", program)
    for operands in calls:
        assert re.findall(r"tensor<(?:\d+x){4}(\w+)>", operands)[:3] == ["bf16"] * 3
    # Not the sums of losses over a mask, which are products with a number as their result.
    products = re.findall(r"stablehlo\.dot_general .* : \(tensor<(.*)>, tensor<(.*)>\) -> tensor<\d+x", program)
    matrices = [shape for shapes in products for shape in shapes if all(shape.count("x") >= 2 for shape in shapes)]
    assert len(matrices) >= 2 * 3 * 4 * MODELS[name].n_layer
    assert {shape.rpartition("x")[2] for shape in matrices} == {"bf16"}


def test_a_head_width_that_cudnn_refuses_runs_by_the_formula(device: jax.Device) -> None:
    """As "auto" has it on a GPU, in bfloat16: the loss equals that in float32 on CPU within a quarter of a rounding."""
    config = resolve(dataclasses.replace(GPT2, d_head=12, attention="auto"), Hardware("gpu", "8.0"))
    assert (config.attention, config.dtype) == ("xla", "bfloat16")
    batch = batch_of(config.context_length, config.vocab_size, packed=True)

    def loss(config: ModelConfig, device: jax.Device) -> float:
        placement = Placement([device])
        evaluate = placement.jit(make_eval_step(next_token, GPT(config), placement.axis_name), donate=False)
        sums = evaluate(jax.device_put(params_of(config), device), placement.split(batch))
        return float(sums.numerator / sums.denominator)

    np.testing.assert_allclose(loss(config, device), loss(in_float32(config), jax.devices("cpu")[0]), rtol=ROUNDING / 4)
