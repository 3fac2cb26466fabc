"""Time and host memory to load GPT-2 medium (random weights, 1.4 GB): python -m benchmarks.load [--rounds 3]

gpt_jax's load_params against transformers' from_pretrained, of the same file, in turns, each in a process of its own.
Memory is the process's peak (VmHWM), libraries included; time is from the libraries being imported to the parameters
being there. The file's pages are in the system's cache before. Writes benchmarks/results/load.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt_jax.files import save_json

ROOT = Path(__file__).parent.parent
CONTESTANTS = ("gpt_jax", "transformers")


def write_model(folder: Path) -> int:
    """Writes the model; returns the bytes of its file."""
    from gpt_jax.config import ModelConfig
    from gpt_jax.interop.families import FAMILIES
    from gpt_jax.interop.load import tensor_shapes
    from gpt_jax.interop.weights import write_safetensors

    config = ModelConfig(vocab_size=50257, n_layer=24, n_head=16, d_model=1024)
    family = FAMILIES["gpt2"]
    shapes = tensor_shapes(family, config)
    rng = np.random.default_rng(0)
    write_safetensors(folder, shapes, lambda name: rng.standard_normal(shapes[name], np.float32))
    save_json(folder / "config.json", family.to_settings(config))
    return (folder / "model.safetensors").stat().st_size


def load_ours(folder: Path) -> float:
    """Seconds to load the parameters."""
    import jax

    from gpt_jax import runtime
    from gpt_jax.placement import Placement
    from gpt_jax.run.load import adopt, open_source

    runtime.setup()
    placement = Placement(jax.devices()[:1])
    begin = time.perf_counter()
    source = open_source(str(folder))
    jax.block_until_ready(source.load_params(adopt(source, source.config), placement))
    return time.perf_counter() - begin


def load_theirs(folder: Path) -> float:
    """Seconds to load the model; every parameter is read once, since it would otherwise stay in the file."""
    import torch
    import transformers

    begin = time.perf_counter()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    sum(float(parameter.sum()) for parameter in model.parameters())
    return time.perf_counter() - begin


def work(contestant: str, folder: Path) -> None:
    """Loads once, and prints the seconds and the peak of memory."""
    seconds = {"gpt_jax": load_ours, "transformers": load_theirs}[contestant](folder)
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def main() -> None:
    """Lets the contestants load in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], Path(args.work[1]))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_model(Path(folder))
        for turn in range(args.rounds):
            for name, runs in results.items():
                command = [sys.executable, "-m", "benchmarks.load", "--work", name, folder]
                printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(printed.splitlines()[-1]))
                shown = f"{runs[-1]['seconds']:.1f} s, peak {runs[-1]['peak_bytes'] / n_bytes:.2f} times the file"
                print(f"round {turn + 1}: {name} {shown}", flush=True)
    summary = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak_bytes")}
        for name, runs in results.items()
    }
    for name, medians in summary.items():
        print(f"{name}: {medians['seconds']:.1f} s, peak {medians['peak_bytes'] / n_bytes:.2f} times the file")
    path = Path(__file__).parent / "results" / "load.json"
    save_json(path, {"file_bytes": n_bytes, "runs": results, "medians": summary})


if __name__ == "__main__":
    main()
