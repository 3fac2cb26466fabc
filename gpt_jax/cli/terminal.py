"""Reading from a terminal and writing to it."""

import contextlib
import json
import sys
from typing import Any

from gpt_jax.errors import UserError


def print_table(rows: dict[str, str], width: int = 0) -> None:
    """Prints names and texts in two columns, the first one `width` characters wide; 0: as wide as its names."""
    width = width or max(map(len, rows)) + 2
    for name, text in rows.items():
        print(f"{name:{width}}{text}")


def print_json(value: dict[str, Any]) -> None:
    """Prints one line of JSON at once, in ASCII where the output is not UTF-8. Raises ValueError for numbers that are
    not finite, which JSON does not have."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not is_utf8, allow_nan=False), flush=True)


def print_error(message: str) -> None:
    """Prints an error, in one line whatever it quotes, on standard error."""
    line = " ".join(message.split("\n"))
    print(f"error: {line}", file=sys.stderr)


def ask() -> str:
    """A line from standard input, with editing and a history on a terminal.

    Raises EOFError at the end of input, and UserError for a line that is not text.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decoded(line, "a line of standard input")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Importing it gives input() editing and a history.
    try:
        return input("> ")
    except UnicodeDecodeError as e:
        raise UserError("this line is not text in the encoding of the terminal") from e


def decoded(content: bytes, where: str) -> str:
    """The text of UTF-8. Raises UserError naming `where` when it is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 text: byte {e.start} is not; convert it first") from e


def say(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)
