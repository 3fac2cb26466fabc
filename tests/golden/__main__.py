"""Golden values: the numbers that this code computes on this machine, to the bit.

A change that only moves code gives the identical loss. To check one, write the values before it and after it, on the
same machine with the same version of JAX:

    python -m tests.golden write before.json
    python -m tests.golden write after.json
    python -m tests.golden compare before.json after.json

All values come from the commands, which outlive any change of the modules below them. Numbers are written as Python
writes floats, with all their digits; parameters and optimizer state as the checksums in their checkpoints.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jaxlib

STEPS = 30
TRAIN = [
    f"--train.steps={STEPS}",
    "--train.log-every=1",
    f"--train.eval-every={STEPS // 2}",
    "--train.sample-every=0",
    "--optimizer.warmup-steps=5",
]
SMALL = ["--model.n-layer=3", "--model.n-head=4", "--model.d-model=32", "--model.context-length=32", *TRAIN]
LLAMA = [
    "--model.n-kv-head=2",
    "--model.d-ff=48",
    "--model.positions=rotary",
    "--model.norm=rms",
    "--model.activation=silu",
    "--model.gated",
    "--model.no-bias",
    "--model.no-tied-head",
    "--data.batch-size=8",
]
WINDOWS = ["--model.window=8", "--model.window-pattern=ssf", "--model.qk-norm", "--model.no-unroll"]
DROPOUT = ["--model.dropout=0.1", "--data.batch-size=8", "--data.microbatch-size=2", "--parallel.devices=2"]
ADAPTERS = ["--model.lora.rank=4", "--model.lora.dropout=0.1", "--data.batch-size=8", "--data.microbatch-size=4"]
MESH = ["--parallel.data=2", "--parallel.fsdp=2", "--parallel.tensor=2", "--model.vocab-multiple=128"]

PROMPTS = ["--prompt=The function ", "--prompt=", "--max-new-tokens=48", "--json"]
DECODINGS = {
    "greedy": ["--temperature=0"],
    "sampled": ["--temperature=0.9", "--top-k=20", "--top-p=0.9", "--num-samples=2", "--seed=3"],
    "penalised": ["--min-p=0.05", "--repetition-penalty=1.2", "--seed=1"],
}


def command(*args: object) -> str:
    """The output of `gpt-jax ARGS`. Raises CalledProcessError when it fails."""
    return subprocess.run(
        [sys.executable, "-m", "gpt_jax", *map(str, args)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def run_values(run: Path) -> dict[str, Any]:
    """The logged numbers of a run that do not depend on a clock, and the checksums of its last state."""
    names = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_bits_per_byte")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    meta = run / "checkpoints" / str(STEPS) / "meta" / "metadata"
    return {
        "records": [{name: record[name] for name in names if name in record} for record in records],
        "checksums": json.loads(meta.read_text())["checksums"],
    }


def write(path: Path) -> None:
    """Trains, decodes and evaluates, and writes all numbers to `path`."""
    values: dict[str, Any] = {"jaxlib": jaxlib.__version__, "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        docs, data, published = folder / "python-docs", folder / "bytes", folder / "published"
        command("prepare", "python-docs", "--out", docs, "--vocab-size", 2048)
        command("prepare", "python-docs", "--out", data, "--tokenizer", "bytes")

        def train(name: str, *args: object) -> Path:
            run = folder / name
            command("train", *args, "--out-dir", run)
            values[name] = run_values(run)
            return run

        quickstart = train("quickstart-1", "--data.dir", docs, *TRAIN, "--parallel.devices=1")
        train("quickstart-2", "--data.dir", docs, *TRAIN, "--parallel.devices=2")
        train("dropout-microbatches", "--data.dir", data, *SMALL, *DROPOUT)
        llama = train("llama", "--data.dir", data, *SMALL, *LLAMA, "--parallel.devices=1")
        train("llama-mesh", "--data.dir", data, *SMALL, *LLAMA, *MESH)
        train("llama-context", "--data.dir", data, *SMALL, *LLAMA, "--parallel.fsdp=2", "--parallel.context=2")
        windows = train("windows", "--data.dir", data, *SMALL, *LLAMA, *WINDOWS, "--parallel.devices=1")
        command("export", "--run", llama, "--out", published)
        command("prepare", "python-docs", "--out", folder / "adapted", "--tokenizer", published)
        adapters = train("adapters", "--data.dir", folder / "adapted", *SMALL[3:], *ADAPTERS, "--init-from", published)
        train("chunked-loss", "--data.dir", data, *SMALL, "--model.loss-chunk=100", "--parallel.devices=2")

        models = {"quickstart": quickstart, "llama": llama, "windows": windows, "adapters": adapters}
        for model, run in models.items():
            for decoding, options in DECODINGS.items():
                lines = command("sample", "--run", run, *PROMPTS, *options).splitlines()
                values[f"{model}-{decoding}"] = [json.loads(line) for line in lines]
        text = folder / "text.txt"
        text.write_text("The value is returned as a list of strings, one for each line of the file.\n" * 9)
        model_args = ["--model", published]
        values["published-greedy"] = json.loads(command("sample", *model_args, *PROMPTS[1:], "--temperature=0"))
        for name, source_args in {"eval-run": ["--run", quickstart], "eval-model": model_args}.items():
            numbers = json.loads(command("eval", *source_args, "--text", text, "--json"))
            values[name] = {key: value for key, value in numbers.items() if key not in ("model", "text")}  # No paths.
    path.write_text(json.dumps(values, indent=1) + "\n")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The paths at which two trees of JSON values differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(one.keys() | other.keys())
        return [d for name in names for d in differences(one.get(name), other.get(name), f"{path}/{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    return [] if one == other else [f"{path}: {one!r} and {other!r}"]


def compare(before: Path, after: Path) -> int:
    """Prints the differences, and returns the exit status: 0 when there are none."""
    found = differences(json.loads(before.read_text()), json.loads(after.read_text()))
    for line in found[:50]:
        print(line)
    print(f"{len(found)} values differ" if found else "identical")
    return min(len(found), 1)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", path]:
            write(Path(path))
        case ["compare", before, after]:
            sys.exit(compare(Path(before), Path(after)))
        case _:
            sys.exit(__doc__)
