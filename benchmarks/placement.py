"""What a placement costs: python -m benchmarks.placement [--rounds 9]

One device: a training step by plain jit and on a mesh of one, the same state and batch, in turns. Two devices: the time
until the call of a step returns, by pmap and on a mesh, of a model so small that there is little else. All in one
process, on CPU. Writes benchmarks/results/placement.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.presets import OPTIMIZER, Preset, presets, random_tokens, small
from benchmarks.results import spread as spread_of
from gpt_jax import runtime
from gpt_jax.config import ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.files import save_json
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import init_state, make_train_step

TINY = Preset("tiny", small(4, 2, 16, 8, "float32"), 2, 200)


class Contestant:
    """A preset on some devices, placed in one way."""

    def __init__(self, preset: Preset, parallel: ParallelConfig, n_devices: int) -> None:
        self.preset = preset
        config = resolve(preset.model, "cpu")
        self.placement = choose_placement(parallel, config, jax.devices()[:n_devices])
        model, optimizer = GPT(config), make_optimizer(OPTIMIZER, 1)
        step = make_train_step(
            next_token, model, optimizer, learning_rate_schedule(OPTIMIZER, 1), 0, self.placement.axis_name
        )
        self.step = self.placement.jit(step, donate=True)
        self.state: Any = self.placement.make(lambda: init_state(model, optimizer, 0))
        self.batch = self.placement.split(Batch(random_tokens(preset, 0)), 1)
        self.turn()  # Compiles.

    def turn(self) -> tuple[float, float]:
        """Milliseconds of a step, and of its call alone: medians of a preset's number of steps."""
        called, done = [], []
        for _ in range(self.preset.steps):
            begin = time.perf_counter()
            self.state, _ = self.step(self.state, self.batch)
            called.append(time.perf_counter() - begin)
            jax.block_until_ready(self.state)
            done.append(time.perf_counter() - begin)
        return statistics.median(done) * 1e3, statistics.median(called) * 1e3


def in_turns(contestants: dict[str, Contestant], rounds: int) -> dict[str, Any]:
    """The spread of each contestant's times, and of the second's step over the first's, round by round."""
    names = list(contestants)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            times[name].append(contestants[name].turn())
    first, second = (times[name] for name in names)
    return {
        "step_ms": {name: spread_of([step for step, _ in found]) for name, found in times.items()},
        "call_ms": {name: spread_of([call for _, call in found]) for name, found in times.items()},
        "second_over_first": spread_of([b[0] / a[0] for a, b in zip(first, second, strict=True)]),
    }


def main() -> None:
    """Measures, prints and keeps both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    rounds = parser.parse_args().rounds
    runtime.setup(cpu_devices=2)
    found: dict[str, Any] = {}
    for name in ("nano", "baby"):
        preset = presets("cpu")[name]
        one = {"jit": ParallelConfig(), "mesh": ParallelConfig(data=1)}
        found[name] = in_turns({kind: Contestant(preset, parallel, 1) for kind, parallel in one.items()}, rounds)
    two = {"pmap": ParallelConfig(), "mesh": ParallelConfig(data=2)}
    found["tiny"] = in_turns({kind: Contestant(TINY, parallel, 2) for kind, parallel in two.items()}, rounds)
    for name, row in found.items():
        steps = ", ".join(
            f"{kind} {spread['median']:.2f} ms a step, {row['call_ms'][kind]['median']:.2f} of them the call"
            for kind, spread in row["step_ms"].items()
        )
        print(f"{name}: {steps}; {row['second_over_first']['median']:.3f} times")
    save_json(Path(__file__).parent / "results" / "placement.json", found)


if __name__ == "__main__":
    main()
