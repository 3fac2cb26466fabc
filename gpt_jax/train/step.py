"""One optimizer step and one evaluation step, as pure functions that run on one device or on many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt_jax.data.batch import Batch
from gpt_jax.model import lora
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.sharding import to_storage
from gpt_jax.train.objectives import Objective, Sums, or_one


class TrainState(NamedTuple):
    """The state that training continues from. `step` counts the optimizer steps taken, an int32 scalar.

    params are the trained parameters: all of them, or adapters. frozen are the others, which no step changes.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params

    def all_params(self) -> Params:
        """All parameters of the model, trained and frozen."""
        return lora.join(self.params, self.frozen)


class StepMetrics(NamedTuple):
    """Float32 scalars of one step: the objective's loss (nats per token for next_token), the global norm of the
    unclipped gradient, the learning rate, and the other values that the objective reports, by name."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    logged: dict[str, jax.Array]


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, with random parameters: only the adapters, if the model has them."""
    params = init_params(model, jax.random.key(seed))
    if model.config.lora.rank:
        params, _ = lora.split(params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), {})


def sum_over(axis_name: str | None, totals: tuple[Sums, Params]) -> tuple[Sums, Params]:
    """The totals over the devices of a mapped axis; themselves where there is none."""
    sums, grads = totals
    return totals if axis_name is None else (sums.over(axis_name), jax.lax.psum(grads, axis_name))


def make_train_step(
    objective: Objective,
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    axis_name: str | None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The train step: `(state, batch)` to `(state, metrics)`.

    batch: this device's share of the global batch, in A microbatches that run one after the other. The objective's
    sums and gradients are summed over microbatches and devices and then divided, so the result does not depend on how
    the batch was cut. A batch without counted targets changes nothing but the step number, and reports a loss of 0. The
    dropout of a sequence depends on the seed, the step and its row in the global batch, but not on the devices; the
    dropout of attention weights depends on the attention backend, too.
    """

    def numerator(trained: Params, frozen: Params, batch: Batch, keys_B: jax.Array | None) -> tuple[jax.Array, Sums]:
        sums = objective(model, lora.join(trained, frozen), batch, keys_B)
        return sums.numerator, sums

    def dropout_keys(step: jax.Array, A: int, B: int) -> jax.Array | None:
        if not model.config.drops:
            return None
        device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
        rows = device * A * B + jnp.arange(A * B)
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows).reshape(A, B)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        A, B = batch.tokens.shape[:2]
        keys_AB = dropout_keys(state.step, A, B)
        gradient = jax.grad(numerator, has_aux=True)

        def microbatch(i: int | jax.Array) -> tuple[Sums, Params]:
            batch_i, keys_B = jax.tree.map(lambda x: x[i], (batch, keys_AB))
            grads, sums = gradient(state.params, state.frozen, batch_i, keys_B)
            return sums, to_storage(grads)

        if A == 1:
            totals = microbatch(0)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(microbatch, 0))

            def add(totals: tuple[Sums, Params], i: jax.Array) -> tuple[tuple[Sums, Params], None]:
                sums, grads = microbatch(i)
                return (totals[0].plus(sums), jax.tree.map(jnp.add, totals[1], grads)), None

            totals, _ = jax.lax.scan(add, zeros, jnp.arange(A))
        sums, grads = sum_over(axis_name, totals)
        may_be_empty = batch.mask is not None
        count = or_one(sums.denominator) if may_be_empty else sums.denominator
        grads = jax.tree.map(lambda g: g / count, grads)
        metrics = StepMetrics(
            sums.numerator / count,
            optax.tree.norm(grads),
            jnp.asarray(schedule(state.step), jnp.float32),
            sums.values(),
        )

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if may_be_empty:  # Momentum and weight decay would move the parameters even without a gradient.
            has_targets, before = sums.denominator > 0, (state.params, state.opt_state)
            params, opt_state = jax.tree.map(lambda a, b: jnp.where(has_targets, a, b), (params, opt_state), before)
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return train_step


def make_eval_step(objective: Objective, model: GPT, axis_name: str | None) -> Callable[[Params, Batch], Sums]:
    """The evaluation step: `(params, batch)` to the objective's sums over all devices, without dropout.

    batch: this device's share, without an axis of microbatches.
    """
    return lambda params, batch: objective(model, params, batch, None).over(axis_name)
