"""Reading from a terminal and writing to it."""

import contextlib
import sys


def print_table(rows: dict[str, str], width: int = 0) -> None:
    """Prints names and texts in two columns, the first one `width` characters wide; 0: as wide as its names."""
    width = width or max(map(len, rows)) + 2
    for name, text in rows.items():
        print(f"{name:{width}}{text}")


def ask() -> str:
    """A line from standard input, with editing and a history on a terminal. Raises EOFError at the end of input."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Importing it gives input() editing and a history.
    return input("> ")


def say(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)
