"""gpt_jax as a contestant in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.presets import OPTIMIZER, from_spec, random_tokens
from benchmarks.worker import peak_memory, resident_memory, seconds_of
from gpt_jax import runtime
from gpt_jax.config import Config, DataConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import TrainState, init_state, make_train_step


class Kept(NamedTuple):
    """The state of `keep_gradients`."""

    gradients: Any


def keep_gradients() -> optax.GradientTransformation:
    """In the place of an optimizer: changes nothing, and its state is the gradients."""

    def init(params: Any) -> Kept:
        return Kept(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: Kept, params: Any = None) -> tuple[Any, Kept]:
        return jax.tree.map(jnp.zeros_like, gradients), Kept(gradients)

    return optax.GradientTransformation(init, update)


class Training:
    """Trains a preset, placed as `train.py` would place it unless told otherwise."""

    def __init__(self, preset: dict[str, Any], devices: int = 0) -> None:
        """preset: a Preset's spec; devices: parallel.devices."""
        self.preset = from_spec(preset)
        config = Config(
            model=self.preset.model,
            data=DataConfig(batch_size=self.preset.batch_size),
            parallel=ParallelConfig(devices=devices),
        )
        runtime.setup(runtime.choose_cpu_devices(config))
        self.placement = Placement(runtime.choose_devices(config))
        self.model = GPT(resolve(self.preset.model, runtime.platform_name(self.placement.devices[0])))
        self.libraries = resident_memory()
        self.train_step, self.make_state = self.build(make_optimizer(OPTIMIZER, 1))
        self.start()

    def build(self, optimizer: optax.GradientTransformation) -> tuple[Callable[..., Any], Callable[[], TrainState]]:
        """The jitted train step with an optimizer, and what makes its initial state."""
        placement, schedule = self.placement, learning_rate_schedule(OPTIMIZER, 1)
        step = make_train_step(next_token, self.model, optimizer, schedule, 0, placement.axis_name)
        step_fn = placement.jit(step, donate=True)
        return step_fn, lambda: placement.make(lambda: init_state(self.model, optimizer, 0))

    def start(self) -> None:
        """Starts anew, with the initial parameters."""
        self.state: TrainState = self.make_state()

    def how(self) -> dict[str, Any]:
        """What "auto" came to."""
        c = self.model.config
        return {
            "devices": self.placement.n_devices,
            "attention": c.attention,
            "unroll": c.unroll,
            "dtype": c.dtype,
            "loss_chunk": c.loss_chunk,
        }

    def write_parameters(self, path: str) -> None:
        """Writes the parameters, by path: the initial ones, before any step."""
        write_tree(path, self.state.params)

    def write_gradients(self, path: str, batch: int) -> None:
        """Writes the gradients of the initial parameters on a batch."""
        step, make_state = self.build(keep_gradients())
        state, _ = step(make_state(), self.tokens(batch))
        write_tree(path, state.opt_state.gradients)

    def tokens(self, batch: int) -> Batch:
        """A batch on the devices."""
        return self.placement.split(Batch(random_tokens(self.preset, batch)), 1)

    def step(self, batch: int) -> Any:
        """An optimizer step on a batch; returns the loss, on its way."""
        self.state, metrics = self.train_step(self.state, self.tokens(batch))
        if self.placement.must_wait:
            jax.block_until_ready(self.state)
        return metrics.loss

    def losses(self, batch: int, count: int) -> list[float]:
        """The losses of so many steps on one and the same batch, which is learned by heart."""
        return [float(self.step(batch)) for _ in range(count)]

    def seconds(self, first: int, count: int) -> float:
        """Seconds a step of so many, from the first one's tokens on the host to the last one's state on the device."""

        def steps() -> None:
            for batch in range(first, first + count):
                self.step(batch)
            jax.block_until_ready(self.state)

        return seconds_of(steps) / count

    def peak_bytes(self) -> int:
        """Most memory that was in use so far."""
        stats = self.placement.devices[0].memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else peak_memory()

    def memory(self) -> dict[str, int]:
        """Bytes, by kind: the process with its libraries and devices, before there was any array; the state, on all
        devices; and the temporaries of a step, by the account that XLA gives. To be called after a step."""
        temporaries = temporary_bytes(self.train_step, self.state, self.tokens(0)) * self.placement.n_devices
        return {"libraries": self.libraries, "state": bytes_of(self.state), "temporaries": temporaries}


def temporary_bytes(step: Any, *arguments: Any, **static: Any) -> int:
    """Bytes that a compiled function needs besides its arguments and results, on each device, as XLA says."""
    return step.lower(*arguments, **static).compile().memory_analysis().temp_size_in_bytes


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays, on all the devices that they lie on."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


def write_tree(path: str, tree: Any) -> None:
    """Writes a tree's arrays to an .npz file, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(x) for at, x in leaves}
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
