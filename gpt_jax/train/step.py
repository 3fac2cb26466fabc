"""One optimizer step and one evaluation step, as pure functions that run on one device or on many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt_jax.model import lora
from gpt_jax.model.gpt import GPT, Params, forward, init_params
from gpt_jax.model.head import head_VD
from gpt_jax.model.loss import loss_sums
from gpt_jax.model.sharding import to_storage


class TrainState(NamedTuple):
    """What training goes on from. `step` counts the optimizer steps taken, an int32 scalar.

    params are those that are trained: all of them, or adapters. frozen are the others, which no step changes.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params

    def all_params(self) -> Params:
        """The parameters of the model."""
        return lora.join(self.params, self.frozen)


class StepMetrics(NamedTuple):
    """Float32 scalars of one step: loss in nats a token, global norm of the unclipped gradient, learning rate."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, with random parameters; of a model with adapters, these alone."""
    params = init_params(model, jax.random.key(seed))
    if model.config.lora.rank:
        params, _ = lora.split(params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), {})


def sum_over(axis_name: str | None, x: Any) -> Any:
    """The sum of `x` over the devices of a mapped axis; `x` itself where there is none."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def make_train_step(
    model: GPT, optimizer: optax.GradientTransformation, schedule: optax.Schedule, seed: int, axis_name: str | None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, StepMetrics]]:
    """The train step: `(state, tokens)` to `(state, metrics)`.

    tokens: int32 (A, B, T + 1), this device's share of the global batch in A microbatches, one after the other. Losses
    and gradients are summed over tokens, microbatches and devices and then divided by the number of tokens, so the
    result does not depend on how the batch was cut. The dropout of a sequence depends on the seed, the step and its row
    in the global batch, and, that of attention weights, on the attention that draws it, but not on the devices.
    """

    def loss_fn(
        trained: Params, frozen: Params, tokens: jax.Array, keys_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        params = lora.join(trained, frozen)
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        hidden_BTD = forward(model, params, inputs_BT, keys_B)
        mask_BT = jnp.ones(targets_BT.shape, jnp.float32)
        return loss_sums(
            hidden_BTD, head_VD(params), targets_BT, mask_BT, model.config.vocab_size, model.config.loss_chunk
        )

    def dropout_keys(step: jax.Array, A: int, B: int) -> jax.Array | None:
        if not model.config.drops:
            return None
        device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
        rows = device * A * B + jnp.arange(A * B)
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows).reshape(A, B)

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, StepMetrics]:
        A, B, _ = tokens.shape
        keys_AB = dropout_keys(state.step, A, B)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def microbatch(i: int | jax.Array) -> Any:
            (loss, count), grads = grad_fn(
                state.params, state.frozen, tokens[i], None if keys_AB is None else keys_AB[i]
            )
            return loss, count, to_storage(grads)

        if A == 1:
            sums = microbatch(0)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(microbatch, 0))
            sums, _ = jax.lax.scan(
                lambda total, i: (jax.tree.map(jnp.add, total, microbatch(i)), None), zeros, jnp.arange(A)
            )
        loss, count, grads = sum_over(axis_name, sums)
        grads = jax.tree.map(lambda g: g / count, grads)
        metrics = StepMetrics(loss / count, optax.tree.norm(grads), jnp.asarray(schedule(state.step), jnp.float32))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return train_step


def make_eval_step(
    model: GPT, axis_name: str | None
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The evaluation step: `(params, tokens, mask)` to the summed loss in nats and the number of targets.

    tokens: int32 (B, T + 1), mask: bool (B, T), this device's share of the batch.
    """

    def eval_step(params: Params, tokens: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = forward(model, params, tokens[:, :-1])
        sums = loss_sums(
            hidden_BTD, head_VD(params), tokens[:, 1:], mask_BT, model.config.vocab_size, model.config.loss_chunk
        )
        return sum_over(axis_name, sums)

    return eval_step
