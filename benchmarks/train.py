"""The training step against eager PyTorch, side by side: python -m benchmarks.train [--preset nano] [--rounds 7]

Each contestant is a process of its own, so that neither holds the other's threads or memory. They take turns, a round
of steps each, while the other one waits; both are warm, and both have every loss brought to the host. Needs the extra
`parity`. Prints a table and writes benchmarks/results/train-PRESET.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from gpt_jax.files import save_json

RESULTS = Path(__file__).parent / "results"


class Preset(NamedTuple):
    """A model and batch to train on CPU in float32, and how many steps make a round of a few seconds."""

    model: ModelConfig
    batch_size: int
    steps: int


def make_preset(L: int, H: int, D: int, T: int, V: int, B: int, steps: int) -> Preset:
    """A preset from its numbers: layers, heads, width, context, vocabulary, batch, steps a round."""
    model = ModelConfig(vocab_size=V, context_length=T, n_layer=L, n_head=H, d_model=D, bias=False, dtype="float32")
    return Preset(model, B, steps)


PRESETS = {
    "nano": make_preset(4, 4, 128, 64, 65, 12, 60),
    "baby": make_preset(6, 6, 384, 256, 65, 8, 4),
    "gpt2": make_preset(12, 12, 768, 256, 50304, 2, 2),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant", beta2=0.99)

Step = Callable[[np.ndarray], float]
"""Trains on tokens (B, T + 1) and returns the loss, which makes sure that the step is done."""


def make_jax_step(preset: Preset) -> Step:
    """Ours, placed as `train.py` would place it."""
    import jax

    from gpt_jax import runtime
    from gpt_jax.model.backend import resolve
    from gpt_jax.model.gpt import GPT
    from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
    from gpt_jax.train.placement import Placement
    from gpt_jax.train.step import init_state, make_train_step

    config = Config(model=preset.model, data=DataConfig(batch_size=preset.batch_size))
    runtime.setup(runtime.choose_cpu_devices(config))
    placement = Placement(runtime.choose_devices(config))
    model = GPT(resolve(preset.model, runtime.platform_name(placement.devices[0])))
    optimizer, schedule = make_optimizer(OPTIMIZER, 1), learning_rate_schedule(OPTIMIZER, 1)
    train_step = placement.jit(
        make_train_step(model, optimizer, schedule, 0, placement.axis_name), n_batch_args=1, donate=True
    )
    state = jax.jit(lambda: init_state(model, optimizer, 0), out_shardings=placement.replicated())()

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = train_step(state, placement.split(tokens, 1))
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step


def make_torch_step(preset: Preset) -> Step:
    """PyTorch's, eager, on all cores."""
    import torch

    from benchmarks.torch_gpt import TorchGPT, make_adamw, train_step

    torch.manual_seed(0)
    model = TorchGPT(preset.model)
    optimizer = make_adamw(model, OPTIMIZER)
    return lambda tokens: train_step(model, optimizer, torch.from_numpy(tokens).long(), OPTIMIZER).item()


CONTESTANTS = {"gpt_jax": make_jax_step, "pytorch": make_torch_step}


def work(contestant: str, preset: Preset) -> None:
    """A contestant's process: for each line on standard input, a round of steps, and its times as a line of JSON."""
    rng = np.random.default_rng(0)
    step = CONTESTANTS[contestant](preset)
    for _ in sys.stdin:
        seconds = []
        for _ in range(preset.steps):
            tokens = rng.integers(
                0, preset.model.vocab_size, (preset.batch_size, preset.model.context_length + 1), dtype=np.int32
            )
            begin = time.perf_counter()
            loss = step(tokens)
            seconds.append(time.perf_counter() - begin)
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


def compare(name: str, rounds: int) -> dict[str, object]:
    """Lets the contestants take turns, after a round to warm up, and returns their figures."""
    workers = {
        contestant: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train", "--preset", name, "--worker", contestant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for contestant in CONTESTANTS
    }
    medians: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    for turn in range(rounds + 1):
        for contestant, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            median = 1e3 * statistics.median(answer["seconds"])
            if turn:
                medians[contestant].append(median)
            print(
                f"round {turn or 'to warm up'}: {contestant:8} {median:8.1f} ms  loss {answer['loss']:.3f}", flush=True
            )
    for worker in workers.values():
        worker.communicate()
    ratios = [torch / ours for ours, torch in zip(medians["gpt_jax"], medians["pytorch"], strict=True)]
    return {
        **{f"{contestant}_ms": summary(values) for contestant, values in medians.items()},
        "times_as_fast_as_pytorch": summary(ratios),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Parses the arguments, and is a contestant or the referee."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="nano", help="model and batch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each contestant")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, PRESETS[args.preset])
        return
    result = {
        "command": f"python -m benchmarks.train --preset {args.preset} --rounds {args.rounds}",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch")},
        "preset": args.preset,
        **compare(args.preset, args.rounds),
    }
    RESULTS.mkdir(exist_ok=True)
    save_json(RESULTS / f"train-{args.preset}.json", result)
    for name in ("gpt_jax_ms", "pytorch_ms", "times_as_fast_as_pytorch"):
        s = result[name]
        assert isinstance(s, dict)
        print(f"{name.replace('_', ' '):26} {s['median']:8.2f}  ({s['min']:.2f} to {s['max']:.2f})")


if __name__ == "__main__":
    main()
