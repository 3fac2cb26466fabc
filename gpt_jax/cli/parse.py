"""Arguments to objects: what the commands share of reading flags, and of naming a model."""

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from gpt_jax.config import check
from gpt_jax.errors import UserError

if TYPE_CHECKING:
    from gpt_jax.run.load import Source

Args = TypeVar("Args")

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is only ever switched on; the configuration's have both forms, --model.bias and --model.no-bias."""


class UsageError(UserError):
    """Arguments that no command could be built from."""


def parse(args_type: type[Args], argv: Sequence[str], command: str, default: Args | None = None) -> Args:
    """The arguments as an object. Raises UsageError with tyro's message, in one line."""
    stderr = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(args_type, args=list(argv), prog=f"gpt-jax {command}", **given)
    except SystemExit as e:
        if e.code == 0:  # --help
            raise
        raise UsageError(f"{in_one_line(stderr.getvalue())}; see gpt-jax {command} --help") from None


def in_one_line(box: str) -> str:
    """The message in an error box that tyro draws, and the first flag that it suggests.

    The message is the first section of the box; where lines cannot be drawn, the second, below a title.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"^[─-]{5,}$", "\n".join(lines), flags=re.MULTILINE)
    message = sections[0 if "╭" in box else 1 :][0]
    suggestion = re.search(r"Perhaps you meant:\s*(--\S+)", " ".join(lines))
    return " ".join(message.split()) + (f"; did you mean {suggestion[1]}?" if suggestion else "")


def default_config_path() -> Path:
    """quickstart.py: of the working folder's configs/, of the checkout that this package is in, or of the package."""
    package = Path(__file__).parent
    places = [folder / "configs" / "quickstart.py" for folder in (Path(), package.parent, package)]
    return next((path for path in places if path.exists()), places[0])


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The value last given to a flag, before the arguments as a whole can be parsed; None when it is not there."""
    value = None
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else following
    return value


def given_fields(argv: Sequence[str]) -> set[str]:
    """The full names of the configuration's fields that flags set, such as "model.n_layer" by --model.n-layer=2."""
    flags = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in argv if a.startswith("--"))
    sections = (flag.rpartition(".") for flag in flags)
    return {f"{section}{dot}{name.removeprefix('no_')}" for section, dot, name in sections}


@dataclass(frozen=True)
class RunArgs:
    """Which model: that of a run."""

    run: str = ""  # Folder of the run; empty: the newest under runs/.
    checkpoint: str = "latest"  # Of a run: latest, best (lowest validation loss), or a step.
    # Longest text in tokens; 0: the model's own. Longer than that: where positions are rotary.
    context_length: int = 0

    def __post_init__(self) -> None:
        check(self.context_length >= 0, "context_length", self.context_length, "0 (the model's own) or more")


@dataclass(frozen=True)
class ModelArgs(RunArgs):
    """Which model: that of a run, or a published one."""

    model: str = ""  # In place of a run: a folder with a published model, a .gguf file, or a name on the hub.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model and (self.run or self.checkpoint != "latest"):
            raise UserError("--model names a model, and --run or --checkpoint another one; use one of them")

    def source(self) -> "Source":
        """The model that they name. Raises UserError when it is not there."""
        from gpt_jax.run.load import choose_source  # Not before: it brings JAX.

        return choose_source(self.run, self.model, self.checkpoint)
