"""One step of an objective on a tiny model, in any placement: what the tests of all objectives compare."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from gpt_jax.config import OptimizerConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.train.objectives import Objective
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import StepMetrics, init_state, make_train_step
from tests import tiny

MODEL = GPT(dataclasses.replace(tiny.GPT2, vocab_multiple=4))  # So that the vocabulary divides over a mesh.
# Steps large enough for a wrong gradient to show, eps large enough for Adam not to blow up the rounding of tiny ones.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, eps=1e-4, weight_decay=0.0)


@functools.cache
def initial_params() -> Params:
    """The parameters before the step."""
    return jax.jit(lambda: init_state(MODEL, make_optimizer(OPTIMIZER, 1), 0).params)()


def one_step(
    objective: Objective, batch: Batch, placement: Placement | None = None, n_micro: int = 1
) -> tuple[Params, StepMetrics]:
    """The parameters after one step on the whole batch, and its metrics, in NumPy."""
    placement = placement or Placement(jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER, 1)
    schedule = learning_rate_schedule(OPTIMIZER, 1)
    step = placement.jit(make_train_step(objective, MODEL, optimizer, schedule, 0, placement.axis_name), donate=False)
    state = placement.make(lambda: init_state(MODEL, optimizer, 0))
    rows = placement.rows(len(batch.tokens), n_micro)
    state, metrics = step(state, placement.split(jax.tree.map(lambda x: x[rows], batch), n_micro))
    return jax.device_get((state.params, metrics))


def padded(batch: Batch, n: int) -> Batch:
    """The batch with n more places in each row, of nonsense that is no target."""

    def pad(x: Any) -> Any:
        if not hasattr(x, "ndim") or x.ndim < 3:
            return x
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)], constant_values=7 if x.dtype == np.int32 else 0)

    return jax.tree.map(pad, batch)


def assert_alike(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Parameters and metrics, within the tolerance."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, expected)


def finite_differences(function: Any, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The gradient of a float64 function by central differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (function(up) - function(down)) / (2 * h)
    return gradient
