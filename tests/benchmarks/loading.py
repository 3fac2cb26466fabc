"""Time and host memory to load GPT-2 medium (random weights, 1.4 GB): python -m tests.benchmarks.loading [ROUNDS]

gpt_jax's load_params against transformers' from_pretrained, of the same file, in turns, each in a process of its own.
Memory is the process's peak (VmHWM), libraries included; time is from the libraries being imported to the parameters
being there. The file's pages are in the system's cache before. Writes benchmarks/results/load.json; `test_memory` holds
the memory within bounds.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import peak_memory, seconds_of
from benchmarks.results import FOLDER
from benchmarks.worker import Worker
from gpt_jax.config import ModelConfig
from gpt_jax.interop.families import FAMILIES
from gpt_jax.interop.load import tensor_shapes
from gpt_jax.interop.weights import write_safetensors
from gpt_jax.placement import Placement
from gpt_jax.run.load import adopt, open_source
from gpt_jax.storage.files import save_json
from tests.benchmarks.restoring import AS_STARTED


def write_model(folder: Path, **sizes: int) -> int:
    """Writes a GPT-2 of random weights as it is published; returns the bytes of its file."""
    config, family = ModelConfig(vocab_size=50257, **sizes), FAMILIES["gpt2"]  # type: ignore[arg-type]
    shapes, rng = tensor_shapes(family, config), np.random.default_rng(0)
    write_safetensors(folder, shapes, lambda name: rng.standard_normal(shapes[name], np.float32))
    save_json(folder / "config.json", family.to_settings(config))
    return (folder / "model.safetensors").stat().st_size


class Loading:
    """Loads with gpt_jax or with transformers."""

    def load(self, contestant: str, folder: str) -> dict[str, float]:
        """Seconds to load the parameters, and bytes that the process held before and at most."""
        work = self.gpt_jax(folder) if contestant == "gpt_jax" else self.transformers(folder)
        before = peak_memory()
        return {"before": before, "seconds": seconds_of(work), "peak_bytes": peak_memory()}

    def gpt_jax(self, folder: str) -> Any:
        """What loads the parameters."""
        import jax

        from gpt_jax import runtime

        runtime.setup()
        placement = Placement(jax.devices()[:1])

        def work() -> None:
            source = open_source(folder)
            jax.block_until_ready(source.load_params(adopt(source, source.config), placement))

        return work

    def transformers(self, folder: str) -> Any:
        """What loads the model; every parameter is read once, since it would otherwise stay in the file."""
        import torch
        import transformers

        def work() -> None:
            model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
            sum(float(parameter.sum()) for parameter in model.parameters())

        return work


def load(contestant: str, folder: Path) -> dict[str, float]:
    """What loading took in a process of its own."""
    with Worker("tests.benchmarks.loading:Loading", AS_STARTED) as worker:
        return dict(worker.ask("load", contestant=contestant, folder=str(folder)))


def main(rounds: int) -> None:
    """Lets the contestants load in turns."""
    runs: dict[str, list[dict[str, float]]] = {"gpt_jax": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_model(Path(folder), n_layer=24, n_head=16, d_model=1024)
        for turn in range(rounds):
            for name, values in runs.items():
                values.append(load(name, Path(folder)))
                shown = f"{values[-1]['seconds']:.1f} s, peak {values[-1]['peak_bytes'] / n_bytes:.2f} times the file"
                print(f"round {turn + 1}: {name} {shown}", flush=True)
    keys = ("seconds", "peak_bytes")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in keys} for name, found in runs.items()
    }
    save_json(FOLDER / "load.json", {"file_bytes": n_bytes, "runs": runs, "medians": medians})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
