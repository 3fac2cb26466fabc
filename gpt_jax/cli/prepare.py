"""`gpt-jax prepare`."""

from collections.abc import Sequence

from gpt_jax.cli.parse import parse
from gpt_jax.system import command_line


def command(argv: Sequence[str]) -> int:
    """Turns text into token files."""
    from gpt_jax.data.prepare import PrepareArgs, prepare, print_summary
    from gpt_jax.data.shards import FORMATS

    args = parse(PrepareArgs, argv, "prepare")
    tokenizer = None
    if args.tokenizer not in ("sentencepiece", "bytes"):
        from gpt_jax.interop.load import named_tokenizer  # It imports JAX, which only models need.

        tokenizer = named_tokenizer(args.tokenizer)
    meta = prepare(args, tokenizer=tokenizer)
    print_summary(args.out, meta)
    if meta.format in FORMATS["next_token"]:
        print(f"next: {command_line('train', '--data.dir', args.out)}")
    return 0
