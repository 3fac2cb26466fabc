"""Host memory to restore a divided state: python -m benchmarks.restore [--rounds 3]

GPT-2 124M with its optimizer's moments, 1.4 GiB in float32, written by one device and by a mesh that divides it in
eight, and restored to meshes of eight simulated CPU devices, whose memory is the host's: each in a process of its own.
Told are the memory that the process has at most, above what it had before, and the temporaries of the compiled
programs that make the first state and sum what was restored. Once as a training has it, where glibc keeps freed memory
for the steps that follow, and once where everything freed goes back, which shows what was really asked for.
Writes benchmarks/results/restore.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.ours import temporary_bytes
from benchmarks.results import spread
from benchmarks.worker import forget_peak, peak_memory, resident_memory
from gpt_jax import runtime
from gpt_jax.config import OptimizerConfig, ParallelConfig
from gpt_jax.files import save_json
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT
from gpt_jax.model.presets import GPT2
from gpt_jax.placement import choose_placement
from gpt_jax.run.checkpoint import Checkpoints, checksum
from gpt_jax.train.optimizer import make_optimizer
from gpt_jax.train.step import TrainState, init_state

ROOT = Path(__file__).parent.parent
PLACEMENTS = {
    "one device": ParallelConfig(devices=1),
    "fsdp 8": ParallelConfig(devices=8, fsdp=8),
    "tensor 4, fsdp 2": ParallelConfig(devices=8, fsdp=2, tensor=4),
}
GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "XLA_FLAGS": runtime.CPU_FLAG,
}
"""Environment in which glibc returns to the kernel what is freed; with the flag that `runtime.setup` would set."""


def work(what: str, where: str, keep: bool, folder: Path) -> None:
    """Writes or restores a checkpoint on the devices of that name; prints what that took."""
    if keep:
        runtime.setup(cpu_devices=8)
    else:
        jax.config.update("jax_num_cpu_devices", 8)
    config = resolve(GPT2, "cpu")
    devices = jax.devices()[: PLACEMENTS[where].devices]
    on = choose_placement(PLACEMENTS[where], config, devices)
    model, optimizer = GPT(config), make_optimizer(OptimizerConfig(), 1)

    def first_state() -> TrainState:
        state = init_state(model, optimizer, 0)
        noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) if x.ndim else x, state.opt_state)
        return state._replace(opt_state=noise) if what == "save" else state

    if what == "save":
        state = on.make(first_state)
        with Checkpoints(folder) as checkpoints:
            facts = {"config": {}, "tokenizer": "", "data": ""}
            checkpoints.save(1, on.to_checkpoint(state.params), on.to_checkpoint(state.opt_state), facts, None)
        return
    shapes = jax.eval_shape(first_state)
    target = on.abstract(shapes)
    init = jax.jit(first_state, out_shardings=on.state_shardings(shapes))
    largest = max(jax.tree.leaves(target), key=lambda x: x.size)
    temporaries = {"init": temporary_bytes(init), "sum of the largest": temporary_bytes(checksum, largest)}
    forget_peak()
    before, begin = resident_memory(), time.perf_counter()
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = [checkpoints.restore(1, item, getattr(target, item)) for item in ("params", "opt_state")]
        jax.block_until_ready(restored)
    sizes = [x.nbytes for x in jax.tree.leaves(restored)]
    found = {
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_memory() - before,
        "state_bytes": sum(sizes),
        "largest_leaf_bytes": max(sizes),
        "temporaries_a_device": temporaries,
    }
    print(json.dumps(found))


def start(what: str, where: str, keep: bool, folder: Path) -> str:
    """Does `work` in another process; returns what it printed."""
    command = [sys.executable, "-m", "benchmarks.restore", "--work", what, where, str(int(keep)), str(folder)]
    environment = os.environ | ({} if keep else GIVE_BACK)
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Restores what each writer wrote to each mesh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each checkpoint is restored in each way")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        what, where, keep, folder = args.work
        work(what, where, keep == "1", Path(folder))
        return
    cases = [(reader, keep) for reader in PLACEMENTS for keep in (True, False)]
    rows = []
    for writer in ("one device", "fsdp 8"):
        found: dict[tuple[str, bool], list[dict[str, Any]]] = {case: [] for case in cases}
        with tempfile.TemporaryDirectory() as folder:
            start("save", writer, True, Path(folder) / "checkpoints")
            for turn in range(args.rounds):
                for reader, keep in cases if turn % 2 == 0 else cases[::-1]:
                    printed = start("restore", reader, keep, Path(folder) / "checkpoints")
                    found[reader, keep].append(json.loads(printed.splitlines()[-1]))
        for (reader, keep), runs in found.items():
            row = {"written_by": writer, "restored_to": reader, "freed_memory_is_kept": keep, **runs[0]}
            row["times_the_state"] = spread([run["peak_bytes"] / run["state_bytes"] for run in runs])
            row["seconds"] = spread([run["seconds"] for run in runs])
            rows.append(row)
            mib = {name: round(n / 2**20) for name, n in row["temporaries_a_device"].items()}
            kept = "freed memory kept" if keep else "given back"
            times = row["times_the_state"]["median"]
            print(f"{writer} to {reader}, {kept}: {times:.2f} times the state, temporaries {mib} MiB a device")
    save_json(Path(__file__).parent / "results" / "restore.json", {"rows": rows})


if __name__ == "__main__":
    main()
