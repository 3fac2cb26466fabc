"""`gpt-jax prepare`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.cli.parse import parse


def command(argv: Sequence[str]) -> int:
    """Turns text into token files."""
    from gpt_jax.data.prepare import PrepareArgs, prepare, print_summary

    args = parse(PrepareArgs, argv, "prepare")
    tokenizer = None
    name = args.tokenizer
    if name.endswith(".gguf") or (name not in ("sentencepiece", "bytes") and not Path(name).exists()):
        from gpt_jax.interop.load import open_named

        tokenizer = open_named(name).tokenizer()
    print_summary(args.out, prepare(args, tokenizer=tokenizer))
    print(f"next: python train.py --data.dir {shlex.quote(str(args.out))}")
    return 0
