"""Reading from a terminal and writing to it."""

import contextlib
import sys


def print_table(rows: dict[str, str], width: int = 0) -> None:
    """Prints names and texts in two columns, the first one `width` characters wide; 0: as wide as it has to be."""
    width = width or max(map(len, rows)) + 2
    for name, text in rows.items():
        print(f"{name:{width}}{text}")


def ask() -> str:
    """A line from standard input, edited with a history where that is a terminal. Raises EOFError at its end."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # It is there once it is imported.
    return input("> ")


def say(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)
