"""Rewards on arithmetic, as a user would learn from them: python -m tests.benchmarks.rewarding FOLDER [SEEDS]

Trains configs/arithmetic.py on a text in which most sums are wrong, then configs/grpo_arithmetic.py with each seed, and
has all of them solve the 1,000 held-out problems, with the most probable answers and with drawn ones. What is in FOLDER
already is not trained again. Writes benchmarks/results/arithmetic.json, and the curves beside it.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import make_figure
from benchmarks.results import FOLDER, Row
from benchmarks.worker import ROOT
from gpt_jax.config import GrpoConfig
from gpt_jax.config.files import load_config
from gpt_jax.run.records import read_records
from gpt_jax.storage.files import replacing, save_json

REWARDED = ROOT / "configs" / "grpo_arithmetic.py"
GRPO = load_config(REWARDED).objective.grpo
TEMPERATURES = {"greedy": 0, "drawn": 1}


def problems(grpo: GrpoConfig) -> tuple[str, ...]:
    """The arguments that name the problems."""
    return (f"--environment={grpo.environment}", "--options", *grpo.options)


def gpt_jax(command: str, *arguments: object) -> list[str]:
    """The lines that a command prints. `run_command` would end one that trains for longer than a contestant may."""
    line = [sys.executable, "-m", "gpt_jax", command, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def solved(model: str, grpo: GrpoConfig, temperature: float, n: int = 1000) -> Row:
    """What `solve` tells of a model, which is named by --run=FOLDER or --model=PATH."""
    flags = (f"--n-problems={n}", f"--max-new-tokens={grpo.max_new_tokens}", f"--temperature={temperature}", "--json")
    [line] = gpt_jax("solve", model, *problems(grpo), *flags)
    found: Row = json.loads(line)
    del found["model"]  # A path of this machine.
    return found


def measured(models: dict[str, tuple[str, float]], grpo: GrpoConfig) -> dict[str, Row]:
    """What models solve, greedily and with drawn answers. models: see `solved`, and the seconds of their training."""
    return {
        name: {"seconds": seconds, **{how: solved(model, grpo, t) for how, t in TEMPERATURES.items()}}
        for name, (model, seconds) in models.items()
    }


def trained(run: Path, configuration: Path, *flags: object) -> float:
    """Trains a run to its end. The seconds that its steps took, evaluations left out."""
    gpt_jax("train", configuration, "--auto-resume", f"--out-dir={run}", *flags)
    records = read_records(run / "metrics.jsonl")
    return sum(r["step_ms"] / 1e3 * (r["step"] - before["step"]) for before, r in pairwise(records))


def main(folder: Path, seeds: int) -> None:
    """Trains and measures what is missing."""
    data, base = folder / "data" / "sums", folder / "runs" / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        gpt_jax("examples", *problems(GRPO), "--n=8000", "--wrong=0.6", f"--out={folder / 'sums.jsonl'}")
        gpt_jax("prepare", folder / "sums.jsonl", f"--out={data}", "--tokenizer=bytes")
    runs = {"before": (base, trained(base, REWARDED.with_name("arithmetic.py"), f"--data.dir={data}"))}
    for seed in range(seeds):
        run = folder / "runs" / f"grpo{seed}"
        seconds = trained(run, REWARDED, f"--init-from={base}", f"--train.seed={seed}")
        runs[f"seed {seed}"] = run, seconds
    rows = measured({name: (f"--run={run}", seconds) for name, (run, seconds) in runs.items()}, GRPO)
    save_json(FOLDER / "arithmetic.json", {"rows": rows, "table": table(rows)})
    with replacing(FOLDER / "arithmetic.png") as temporary:
        before = solved(f"--run={base}", GRPO, 0, GRPO.eval_problems)["reward"]
        draw({name: run for name, (run, _) in runs.items() if name != "before"}, before).savefig(
            temporary, format="png", dpi=120, metadata={"Software": None}
        )


def table(rows: dict[str, Row]) -> list[list[str]]:
    """The cells of a table in docs/post-training.md."""

    def rate(found: Row) -> str:
        return f"{found['pass@1']:.1%} ({found['pass@1_low']:.1%} to {found['pass@1_high']:.1%})"

    title = "1,000 held-out problems: pass@1 (95%)"
    lines = [[title, "most probable answers", "drawn answers", "seconds of training steps"]]
    return lines + [[name, rate(r["greedy"]), rate(r["drawn"]), f"{r['seconds']:.0f}"] for name, r in rows.items()]


def draw(runs: dict[str, Path], before: float) -> Any:
    """The rewards of each run: of the problems that it learns from, and of held-out ones, which were so much before."""
    figure = make_figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        records = read_records(run / "metrics.jsonl")
        axes[0].plot([r["step"] for r in records], means_of_ten(records, "reward"))
        axes[1].plot(*held_out(records, before), label=name)
    axes[0].set(title="drawn answers, mean of ten records", xlabel="step", ylabel="reward")
    axes[1].set(title="held out, most probable answers", xlabel="step")
    for each in axes:
        each.set_ylim(bottom=0)
        each.grid(alpha=0.3)
    axes[1].legend()
    return figure


def means_of_ten(records: list[Row], name: str) -> list[float]:
    """At each record, the mean of a number over it and up to nine before."""
    values = [record[name] for record in records]
    return [float(np.mean(values[max(0, i - 9) : i + 1])) for i in range(len(values))]


def held_out(records: list[Row], before: float) -> tuple[list[int], list[float]]:
    """Steps, and the rewards of held-out problems, which were so much before the first one."""
    found = [record for record in records if "val_reward" in record]
    return [0, *(record["step"] for record in found)], [before, *(record["val_reward"] for record in found)]


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
