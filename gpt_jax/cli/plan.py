"""`gpt-jax plan`: the memory and time of a training run on devices that are not here, as a table."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt_jax.cli.parse import default_config_path, given_fields, parse
from gpt_jax.cli.terminal import print_table
from gpt_jax.config import Config, check, load_config, with_vocabulary
from gpt_jax.data.shards import open_dataset
from gpt_jax.storage.remote import location


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Tell what a training run needs on devices that are not here: memory, collectives, and what bounds its time. The
    first argument may be a configuration file; configs/quickstart.py is the default."""

    target: str = "v5e-4"  # The devices: a TPU slice such as v5e-16, v5p-32, v6e-8, or GPUs such as h100x8.
    tries: int = 4  # Variants (microbatches, rematerialisation) to compile for a recommendation; 0: none.
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        check(self.tries >= 0, "tries", self.tries, "0 or more")


def command(argv: Sequence[str]) -> int:
    """Tells what a training run needs on devices that are not here. Returns 1 when it does not fit."""
    words = list(argv)
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else default_config_path()
    args = parse(PlanArgs, words, "plan", PlanArgs(config=load_config(path)))
    config, data_folder = args.config, location(args.config.data.dir)
    if config.init_from:
        from gpt_jax.train.setup import start_from

        config, tokenizer = start_from(config, given_fields(argv))
        config = with_vocabulary(config, tokenizer.vocab_size)
    elif not config.model.vocab_size and (data_folder / "meta.json").exists():
        config = with_vocabulary(config, open_dataset(data_folder).tokenizer.vocab_size)
    elif not config.model.vocab_size:  # The data are not prepared yet: the size to ask for.
        config = with_vocabulary(config, config.data.vocab_size)

    # Without these, libtpu would ask the metadata server of a cloud machine for its TPU.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
    import jax

    from gpt_jax import runtime
    from gpt_jax.plan.planner import Planner, can_compile, flags
    from gpt_jax.plan.report import describe
    from gpt_jax.plan.targets import parse_target

    jax.config.update("jax_platforms", "cpu")
    # The cache cannot load programs for devices that are not here, and would warn about it.
    jax.config.update("jax_enable_compilation_cache", False)
    target = parse_target(args.target)
    runtime.setup(1 if can_compile(target) else target.n_devices)

    planner = Planner(config, target, can_compile(target))
    plan = planner.plan(config)
    print_table(describe(plan, planner))
    sys.stdout.flush()
    if args.tries:
        best = planner.recommend(plan, args.tries, lambda text: print(text, file=sys.stderr))
        if best is None:
            print("\nrecommended: none of what was tried fits; more devices, parallel.fsdp or a smaller model would")
        elif best is plan:
            print("\nrecommended: as it is")
        else:
            print(f"\nrecommended: {flags(best.config)}\n")
            print_table(describe(best, planner))
    return 1 if plan.program.lacking else 0
