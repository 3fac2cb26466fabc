"""Parsing of arguments into objects, and the arguments that name a model, for all commands."""

import contextlib
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

import gpt_jax
from gpt_jax.config import check
from gpt_jax.errors import UserError
from gpt_jax.system import command_line

if TYPE_CHECKING:
    from gpt_jax.run.load import Source

Args = TypeVar("Args")

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that can only be switched on. Flags of the configuration have two forms, --model.bias and --model.no-bias."""


class UsageError(UserError):
    """Arguments that a command cannot be built from."""


WIDTHS = range(40, 401)
"""Characters of a line of help, at least and at most, whatever the width of the terminal is.

For a report to tyro: version 1.0.17 never returns, and takes all memory, when it draws help for a terminal of few
columns, as with `def f(x: int) -> None: ...` and `COLUMNS=5 python -c "...; tyro.cli(f, args=['--help'])"`. The box
leaves no column for its text, and `_Text.render(width)` in _fmtlib.py, asked for a width of 0 or less, cuts off pieces
of a word of which none gets shorter. A width of at least 1 there, or the 40 columns that `__str__` takes at least,
would end it."""


@contextlib.contextmanager
def bounded_width(is_help: bool) -> Iterator[None]:
    """Tells tyro the width of the terminal, within WIDTHS. Messages of errors are not shown as tyro draws them, and get
    the 80 characters that it takes at most, since it would cut long flags in narrower lines."""
    with contextlib.ExitStack() as stack:
        columns = os.environ.get("COLUMNS")
        if columns is None:
            stack.callback(os.environ.pop, "COLUMNS", None)
        else:
            stack.callback(os.environ.__setitem__, "COLUMNS", columns)
        width = shutil.get_terminal_size().columns if is_help else 80
        os.environ["COLUMNS"] = str(min(max(width, WIDTHS[0]), WIDTHS[-1]))
        yield


def parse(args_type: type[Args], argv: Sequence[str], command: str, default: Args | None = None) -> Args:
    """The arguments as an object. Raises UsageError with tyro's message, in one line."""
    stderr = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr), bounded_width(not {"-h", "--help"}.isdisjoint(argv)):
            return tyro.cli(args_type, args=list(argv), prog=f"gpt-jax {command}", **given)
    except SystemExit as e:
        if not e.code:  # --help, or tyro's own --tyro-print-completion
            sys.stdout.flush()  # Here, where errors of writing are told, and not when the process ends.
            raise
        raise UsageError(f"{in_one_line(stderr.getvalue())}; see {command_line(command, '--help')}") from None


def in_one_line(box: str) -> str:
    """The message in an error box that tyro draws, and the first flag that it suggests.

    The message is the first section of the box, or the second, below a title, when tyro cannot draw lines.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"^[─-]{5,}$", "\n".join(lines), flags=re.MULTILINE)
    message = sections[0 if "╭" in box else 1 :][0]
    suggestion = re.search(r"Perhaps you meant:\s*(--\S+)", " ".join(lines))
    return " ".join(message.split()) + (f"; did you mean {suggestion[1]}?" if suggestion else "")


def default_config_path() -> Path:
    """The path of quickstart.py: in configs/ of the working folder, of this package's checkout, or of the package."""
    package = Path(gpt_jax.__file__).parent
    places = [folder / "configs" / "quickstart.py" for folder in (Path(), package.parent, package)]
    return next((path for path in places if path.exists()), places[0])


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The last value of a flag in arguments that have not been parsed; None when the flag is missing."""
    value = None
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else following
    return value


def given_fields(argv: Sequence[str]) -> set[str]:
    """The full names of the configuration's fields that flags set, such as "model.n_layer" for --model.n-layer=2."""
    flags = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in argv if a.startswith("--"))
    sections = (flag.rpartition(".") for flag in flags)
    return {f"{section}{dot}{name.removeprefix('no_')}" for section, dot, name in sections}


@dataclass(frozen=True)
class RunArgs:
    """Arguments that name the model of a run."""

    run: str = ""  # Folder of the run; empty: the newest under runs/.
    checkpoint: str = "latest"  # Of a run: latest, best (lowest validation loss), or a step.
    # Longest text in tokens; 0: the model's own. A longer context is possible with rotary positions.
    context_length: int = 0

    def __post_init__(self) -> None:
        check(self.context_length >= 0, "context_length", self.context_length, "0 (the model's own) or more")


@dataclass(frozen=True)
class ModelArgs(RunArgs):
    """Arguments that name the model of a run, or a published model."""

    model: str = ""  # Instead of a run: a folder with a published model, a .gguf file, or a name on the hub.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model and (self.run or self.checkpoint != "latest"):
            raise UserError("--model names a model, and --run or --checkpoint another one; use one of them")

    def source(self) -> "Source":
        """The model that the arguments name. Raises UserError when it is missing."""
        from gpt_jax.run.load import choose_source  # Here, since it imports JAX.

        return choose_source(self.run, self.model, self.checkpoint)
