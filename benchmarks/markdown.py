"""Measurements as Markdown: tables of columns that are declared, lists, and numbers with their units."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.results import Row

NOTHING = "–"  # noqa: RUF001


class Column(NamedTuple):
    """A column of a table: its title, and what stands in it on a line."""

    title: str
    cell: Callable[[Any], str]


def table(columns: Sequence[Column], lines: Iterable[Any]) -> str:
    """Markdown; empty where there are no lines."""
    cells = [[column.cell(line).replace("|", "\\|") for column in columns] for line in lines]
    rows = [[column.title for column in columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if cells else ""


def facts(title: str, lines: Mapping[str, str]) -> str:
    """A table of named facts."""
    return table([Column(title, lambda line: line[0]), Column("", lambda line: line[1])], lines.items())


def bullets(lines: Iterable[str]) -> str:
    """Markdown of a list; no two are the same, and none opens or closes a marker."""
    return "\n".join(f"- {line.replace('<!--', '')}" for line in dict.fromkeys(lines))


def number(value: float) -> str:
    """Three digits of a number, or two decimals of one below 1."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def with_range(found: Row | None, write: Callable[[float], str] = number) -> str:
    """Median (min to max), or the median where there is no more to tell."""
    if found is None:
        return NOTHING
    median = write(found["median"])
    if "min" not in found:
        return median
    return f"{median} ({write(found['min'])} to {write(found['max'])})"


def flops(per_second: float) -> str:
    """FLOP/s, in units that people read."""
    return f"{number(per_second / 1e12)} TFLOP/s" if per_second >= 1e12 else f"{number(per_second / 1e9)} GFLOP/s"


def memory(n_bytes: float | None) -> str:
    """Bytes, in units that people read."""
    if n_bytes is None:
        return NOTHING
    return f"{number(n_bytes / 2**30)} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def seconds(value: float | None) -> str:
    """Seconds, or a dash."""
    return NOTHING if value is None else f"{number(value)} s"
