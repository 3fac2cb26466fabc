"""Host memory to restore a divided state: python -m tests.benchmarks.restoring [ROUNDS]

GPT-2 124M with its optimizer's moments, 1.4 GiB in float32, written by one device and by a mesh that divides it in
eight, and restored to meshes of eight simulated CPU devices, whose memory is the host's. Measured once as a training
has it, where glibc keeps freed memory for the steps that follow, and once where everything freed goes back, which shows
what was really asked for. Writes benchmarks/results/restore.json; `test_memory` holds what it measures within bounds.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.markdown import with_range
from benchmarks.measure import forget_peak, memory_of_libraries, peak_memory, spread
from benchmarks.results import FOLDER, Row
from benchmarks.worker import Worker
from gpt_jax import runtime
from gpt_jax.config import OptimizerConfig, ParallelConfig
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.model.presets import GPT2
from gpt_jax.placement import choose_placement
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.storage.files import save_json
from gpt_jax.train.optimizer import make_optimizer
from gpt_jax.train.step import TrainState, init_state

PLACEMENTS: dict[str, dict[str, int]] = {
    "one device": {"devices": 1},
    "fsdp 8": {"devices": 8, "fsdp": 8},
    "tensor 4, fsdp 2": {"devices": 8, "fsdp": 2, "tensor": 4},
}
TUNABLES = "GLIBC_TUNABLES"
AS_STARTED = {TUNABLES: os.environ.get(TUNABLES, "")}
"""Environment without the settings of the allocator that contestants have in common."""
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Environment in which glibc returns to the kernel what is freed."""


class Restoring:
    """Writes and restores checkpoints, in a process of its own."""

    def __init__(self, where: str, keep: bool) -> None:
        """where: the name of a placement; keep: whether glibc keeps what is freed."""
        if keep:
            runtime.setup(cpu_devices=8)
        else:
            os.environ["XLA_FLAGS"] = runtime.CPU_FLAG
            jax.config.update("jax_num_cpu_devices", 8)
        config, parallel = resolve(GPT2, "cpu"), ParallelConfig(**PLACEMENTS[where])
        self.placement = choose_placement(parallel, config, jax.devices()[: parallel.devices])
        self.model, self.optimizer = GPT(config), make_optimizer(OptimizerConfig(), 1)

    def first_state(self) -> TrainState:
        """The state before the first step."""
        return init_state(self.model, self.optimizer, 0)

    def noisy_state(self) -> TrainState:
        """The same with moments that are not zero, which a checkpoint would hold in less space."""
        state = self.first_state()
        noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) if x.ndim else x, state.opt_state)
        return state._replace(opt_state=noise)

    def save(self, folder: str) -> None:
        """Writes a checkpoint."""
        state = self.placement.make(self.noisy_state)
        params, opt_state = (self.placement.to_checkpoint(tree) for tree in (state.params, state.opt_state))
        with Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(1, params, opt_state, {"config": {}, "tokenizer": "", "data": ""}, None)

    def restore(self, folder: str) -> dict[str, float]:
        """Seconds, the peak of memory in bytes above what the process had before, and the size of the state."""
        target = self.placement.abstract(jax.eval_shape(self.first_state))
        forget_peak()
        before, begin = memory_of_libraries(on_cpu=True), time.perf_counter()
        with Checkpoints(Path(folder), read_only=True) as checkpoints:
            restored = [checkpoints.restore(1, item, getattr(target, item)) for item in ("params", "opt_state")]
            jax.block_until_ready(restored)
        seconds, peak = time.perf_counter() - begin, peak_memory() - before
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(restored))
        return {"seconds": seconds, "peak_bytes": peak, "state_bytes": state_bytes}


def work(what: str, where: str, keep: bool, folder: Path) -> Any:
    """Saves or restores in a process of its own; what that returns."""
    environment = {**AS_STARTED, **({} if keep else GIVE_BACK)}
    with Worker("tests.benchmarks.restoring:Restoring", environment, where=where, keep=keep) as worker:
        return worker.ask(what, folder=str(folder))


def main(rounds: int) -> None:
    """Restores what each writer wrote to each placement."""
    cases = [(reader, keep) for reader in PLACEMENTS for keep in (True, False)]
    rows = []
    for writer in ("one device", "fsdp 8"):
        found: dict[tuple[str, bool], list[Row]] = {case: [] for case in cases}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoints"
            work("save", writer, True, folder)
            for turn in range(rounds):
                for reader, keep in cases if turn % 2 == 0 else cases[::-1]:
                    found[reader, keep].append(work("restore", reader, keep, folder))
        for (reader, keep), runs in found.items():
            row = {"written_by": writer, "restored_to": reader, "freed_memory_is_kept": keep, **runs[0]}
            row["times_the_state"] = spread([run["peak_bytes"] / run["state_bytes"] for run in runs])
            row["seconds"] = spread([run["seconds"] for run in runs])
            rows.append(row)
            kept = "freed memory kept" if keep else "given back"
            print(f"{writer} to {reader}, {kept}: {row['times_the_state']['median']:.2f} times the state", flush=True)
    save_json(FOLDER / "restore.json", {"rows": rows, "table": table(rows)})


def table(rows: list[Row]) -> list[list[str]]:
    """The cells of the table in docs/speed.md: a line for each writer and reader, which has two rows."""
    title = "memory to restore GPT-2 124M, times its state (`python -m tests.benchmarks.restoring`)"
    cells = {"": [title, "as in training", "if all that is freed goes back"]}
    for row in sorted(rows, key=lambda row: not row["freed_memory_is_kept"]):
        name = f"{row['written_by']} to {row['restored_to']}"
        cells.setdefault(name, [name]).append(with_range(row["times_the_state"]))
    return list(cells.values())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
