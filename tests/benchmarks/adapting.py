"""Rewards and preferences for SmolLM2-135M-Instruct, by adapters.

python -m tests.benchmarks.adapting FOLDER MODEL PAIRS

Does what configs/grpo_smollm2.py says, then trains configs/dpo.py on a file of preferences, PAIRS. MODEL is the model's
folder or .gguf file. What is in FOLDER already is not trained again. Writes benchmarks/results/smollm2-rewards.json,
smollm2-preferences.json, and the curves, smollm2.png.
"""

import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.plots import make_figure
from benchmarks.results import FOLDER, Row
from benchmarks.worker import ROOT
from gpt_jax.config.files import load_config
from gpt_jax.data.preferences import PairFolder
from gpt_jax.data.shards import open_dataset
from gpt_jax.evaluate.solve import interval
from gpt_jax.run.records import read_records
from gpt_jax.storage.files import replacing, save_json
from tests.benchmarks.rewarding import gpt_jax, held_out, means_of_ten, measured, problems, solved, table, trained

CONFIGS = ROOT / "configs"
GRPO = load_config(CONFIGS / "grpo_smollm2.py").objective.grpo
VALIDATION = 0.4
"""The share of the pairs that is held out: there are few."""


def main(folder: Path, model: str, pairs: Path) -> None:
    """Trains and measures what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, model, pairs)
    runs = folder / "runs"
    few = ("--data.batch-size=2", "--train.steps=20", "--optimizer.warmup-steps=3", "--model.lora.rank=8")
    sums = (f"--init-from={model}", f"--data.dir={folder / 'data' / 'sums'}", *few)
    imitating = trained(runs / "sums", CONFIGS / "sft_chat.py", *sums)
    rewarded = trained(runs / "rl", CONFIGS / "grpo_smollm2.py", f"--init-from={runs / 'sums'}")
    models = {
        "as published": (f"--model={model}", 0.0),
        "after 20 steps on examples": (f"--run={runs / 'sums'}", imitating),
        "after 80 steps on rewards": (f"--run={runs / 'rl'}", rewarded),
    }
    dpo = (f"--init-from={model}", f"--data.dir={folder / 'data' / 'pairs'}")
    seconds = trained(runs / "dpo", CONFIGS / "dpo.py", *dpo)
    preferring = read_records(runs / "dpo" / "metrics.jsonl")

    rows = measured(models, GRPO)
    save_json(FOLDER / "smollm2-rewards.json", {"rows": rows, "table": table(rows)})
    context_length = load_config(CONFIGS / "dpo.py").model.context_length
    n_pairs = len(PairFolder(open_dataset(folder / "data" / "pairs")).rows("val", context_length))
    evaluated = [record for record in preferring if "val_accuracy" in record]
    found = {"pairs": n_pairs, "seconds": seconds, "rows": evaluated, "table": preferences_table(evaluated, n_pairs)}
    save_json(FOLDER / "smollm2-preferences.json", found)
    before = solved(f"--run={runs / 'sums'}", GRPO, 0, GRPO.eval_problems)["reward"]
    with replacing(FOLDER / "smollm2.png") as temporary:
        figure = draw(read_records(runs / "rl" / "metrics.jsonl"), before, preferring)
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def prepare(folder: Path, model: str, pairs: Path) -> None:
    """Prepares examples of the problems, and the pairs, if they are not there."""
    data = folder / "data"
    if not (data / "sums").exists():
        examples = ("--template=<answer>{answer}</answer>", "--n=400", f"--out={folder / 'sums.jsonl'}")
        gpt_jax("examples", *problems(GRPO), *examples)
        gpt_jax("prepare", folder / "sums.jsonl", f"--out={data / 'sums'}", f"--tokenizer={model}")
    if not (data / "pairs").exists():
        flags = ("--format=preference", f"--out={data / 'pairs'}", f"--tokenizer={model}")
        gpt_jax("prepare", pairs, *flags, f"--val-fraction={VALIDATION}")


def preferences_table(evaluated: list[Row], n: int) -> list[list[str]]:
    """The cells of the table of n held-out pairs. Before the first step, nothing has drifted, and every pair is a
    tie; after it, none is."""
    names = ("val_loss", "val_margin", "val_chosen_drift", "val_rejected_drift")
    title = f"{n} held-out pairs: step"
    lines = [[title, "accuracy (95%)", "loss", "margin", "nats the chosen answer gained", "the rejected one"]]
    lines.append(["0", "50%, all are ties", f"{math.log(2):.4f}", "0", "0", "0"])
    for record in evaluated:
        n_right = round(record["val_accuracy"] * n)
        low, high = interval([1.0] * n_right + [0.0] * (n - n_right))
        accuracy = f"{record['val_accuracy']:.1%} ({low:.1%} to {high:.1%})"
        loss, *others = (record[name] for name in names)
        lines.append([str(record["step"]), accuracy, f"{loss:.4f}", *(f"{x:+.2f}" for x in others)])
    return lines


def draw(rewarded: list[Row], before: float, preferring: list[Row]) -> Any:
    """The rewards of the one run, whose held-out ones were so much before, and the drifts of the other."""
    figure = make_figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in rewarded], means_of_ten(rewarded, "reward"), label="drawn answers, mean of ten steps")
    left.plot(*held_out(rewarded, before), marker="o", label="held out, most probable answers")
    left.set(title="rewards", xlabel="step", ylabel="reward")
    left.set_ylim(bottom=0)
    for kind in ("chosen", "rejected"):
        [line] = right.plot(
            [r["step"] for r in preferring],
            means_of_ten(preferring, f"{kind}_drift"),
            label=f"{kind}, mean of ten steps",
        )
        evaluated = [r for r in preferring if f"val_{kind}_drift" in r]
        right.plot(
            [r["step"] for r in evaluated],
            [r[f"val_{kind}_drift"] for r in evaluated],
            "o",
            color=line.get_color(),
            label=f"{kind}, held out",
        )
    right.set(title="preferences", xlabel="step", ylabel="nats an answer gained")
    for each in (left, right):
        each.grid(alpha=0.3)
        each.legend()
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2], Path(sys.argv[3]).absolute())
