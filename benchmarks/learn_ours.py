"""gpt_jax as a contestant in learning: a loop of its parts, run as a process by benchmarks.learn."""

import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learn import Recipe, Windows, initial_parameters, read_text, say, whole_val
from benchmarks.ours import bytes_of, temporary_bytes
from benchmarks.worker import peak_memory, resident_memory
from gpt_jax import runtime
from gpt_jax.config import Config, DataConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import Prefetch
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import TrainState, make_eval_step, make_train_step


def main(recipe: Recipe, path: str, draws: str, devices: int) -> None:
    """Trains, and tells the referee of each evaluation.

    path: the text; draws: the file with the initial parameters and the windows; devices: parallel.devices.
    """
    text = read_text(path)
    windows = Windows(recipe, text, draws)
    config = Config(
        model=recipe.model(text.vocab_size),
        data=DataConfig(batch_size=recipe.batch_size),
        optimizer=recipe.optimizer(),
        parallel=ParallelConfig(devices=devices),
    )
    runtime.setup(runtime.choose_cpu_devices(config))
    placement = Placement(runtime.choose_devices(config))
    libraries = resident_memory()
    model = GPT(resolve(config.model, runtime.platform_name(placement.devices[0])))
    optimizer = make_optimizer(config.optimizer, recipe.steps)
    schedule = learning_rate_schedule(config.optimizer, recipe.steps)
    step = make_train_step(next_token, model, optimizer, schedule, 0, placement.axis_name)
    train_step = placement.jit(step, donate=True)
    eval_step = placement.jit(make_eval_step(next_token, model, placement.axis_name), donate=False)

    def mean_loss(params: Any, batches: Any) -> float:
        sums = []
        for batch in batches:
            sums.append(eval_step(params, batch)[:2])
            if placement.must_wait:
                jax.block_until_ready(sums[-1])
        loss, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(loss / count)

    def evaluate(params: Any, number: int, iterations: int) -> None:
        _, val_loss = (
            mean_loss(params, [placement.split(Batch(tokens)) for tokens in split])
            for split in windows.evaluation(number)  # nanoGPT estimates that of the training split, too.
        )
        say(iterations=iterations, tokens=iterations * recipe.batch_size * recipe.context_length, val_loss=val_loss)

    initial = tree_of(initial_parameters(draws))
    params = jax.device_put(initial, placement.state_shardings(initial))
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), {})
    evaluate(params, 0, 0)
    numbers = itertools.count(1)
    with Prefetch(lambda step: placement.split(Batch(windows.train(step)), 1), range(recipe.steps)) as batches:
        for iterations, tokens in enumerate(batches, 1):
            state, _ = train_step(state, tokens)
            if placement.must_wait:
                jax.block_until_ready(state)
            if recipe.evaluates(iterations):
                evaluate(state.params, next(numbers), iterations)

    stats = placement.devices[0].memory_stats()
    peak_bytes = int(stats["peak_bytes_in_use"]) if stats else peak_memory()
    memory = {
        "libraries": libraries,
        "state": bytes_of(state),
        "temporaries": temporary_bytes(train_step, state, tokens) * placement.n_devices,
    }
    say(
        whole_val_loss=mean_loss(state.params, (placement.split(Batch(*batch)) for batch in whole_val(recipe, text))),
        peak_bytes=peak_bytes,
        memory=memory,
    )


def tree_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree of arrays that are named by their paths."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parts, name = path.split("/")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[name] = array
    return tree


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main(**{**spec, "recipe": Recipe(**spec["recipe"])})
