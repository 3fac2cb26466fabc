#!/usr/bin/env bash
# Writes docs/plans.md: what `plan` says of some configurations. Needs the extra tpu, and some ten minutes: docs/plans.sh
set -euo pipefail
cd "$(dirname "$0")/.."

plan() {
    printf '\n```\n$ python -m gpt_jax plan %s\n' "$*"
    python -m gpt_jax plan "$@" || true # Status 1: it does not fit.
    printf '```\n'
}

{
    printf '# Plans\n\n'
    # shellcheck disable=SC2016  # Backquotes of Markdown.
    printf 'What `python -m gpt_jax plan` says, written by [plans.sh](plans.sh) on a machine with two CPU cores and no\n'
    printf 'accelerator, with libtpu %s. Memory and collectives of TPU plans are those of the compiled program; times\n' \
        "$(python -c 'import importlib.metadata; print(importlib.metadata.version("libtpu"))')"
    printf 'are what a roofline allows at best, and nothing was run.\n\n## GPT-2 124M on four TPU v5e, by pmap\n'
    plan configs/gpt2_124m.py --target v5e-4
    printf '\n## GPT-2 xl on sixteen TPU v5e, divided over all of them\n'
    plan configs/gpt2_xl.py --target v5e-16 --parallel.fsdp 16
    printf '\n## A Llama of 7 billion parameters on sixteen TPU v5p, 8 x 2\n'
    plan configs/llama2_7b.py --target v5p-32
    printf '\n## The same with 32,768 tokens a sequence, each divided over four of eight TPU v5p\n'
    plan configs/llama2_7b.py --target v5p-16 --model.context-length 32768 --data.batch-size 128 \
        --data.microbatch-size 1 --parallel.fsdp 2 --parallel.context 4 --parallel.tensor 1
    printf '\n## The Llama of 4,096 tokens a sequence on four TPU v6e, which is too few\n'
    plan configs/llama2_7b.py --target v6e-4 --parallel.fsdp 4 --parallel.tensor 1 --tries 1
    printf '\n## The same on eight H100, by formula\n'
    plan configs/llama2_7b.py --target h100x8 --parallel.fsdp 8 --parallel.tensor 1
} > docs/plans.md
