"""`gpt-jax export`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.cli.parse import RunArgs, Switch, parse
from gpt_jax.config import StoredDType, check
from gpt_jax.system import command_line


@dataclass(frozen=True)
class ExportArgs(RunArgs):
    """Write the model of a run, adapters merged, as a folder that transformers loads."""

    out: str = ""  # The folder to write, whole or not at all.
    dtype: StoredDType = "float32"  # Type that the parameters are rounded to.
    force: Switch = False  # Replace an exported model that is already in the folder.

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.out), "out", self.out, "the folder to write: --out FOLDER")


def command(argv: Sequence[str]) -> int:
    """Writes a run as a folder that other software loads."""
    args = parse(ExportArgs, argv, "export")

    import jax

    from gpt_jax import runtime
    from gpt_jax.export.folder import export
    from gpt_jax.run.folder import newest_run, run_folder

    jax.config.update("jax_platforms", "cpu")  # The accelerators stay free, also for a training that goes on.
    runtime.setup()
    run, out = run_folder(args.run) if args.run else newest_run(), Path(args.out)
    family, n_params = export(run, out, args.checkpoint, args.dtype, args.context_length, args.force)
    print(f"{out}: {family.architecture}, {n_params:,} parameters in {args.dtype}")
    next_command = command_line("sample", "--model", out)
    print(f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}); {next_command}")
    return 0
