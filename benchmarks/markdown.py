"""Measurements as Markdown: tables, lists, and numbers with their units."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.results import Row

NOTHING = "–"  # noqa: RUF001


def table_of(cells: Sequence[Sequence[str]]) -> str:
    """A table of cells, its titles first."""
    titles, *rows = ([cell.replace("|", "\\|") for cell in row] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def bullets(lines: Iterable[str]) -> str:
    """A list; no two lines are the same, and none opens or closes a marker."""
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


def flops(per_second: float) -> str:
    """FLOP/s, in units that people read."""
    return f"{number(per_second / 1e12)} TFLOP/s" if per_second >= 1e12 else f"{number(per_second / 1e9)} GFLOP/s"


def memory(n_bytes: float) -> str:
    """Bytes, in units that people read."""
    return f"{number(n_bytes / 2**30)} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def as_spread(found: Row | float) -> Row:
    """A spread as it is, and a number as a median of which there is no more to tell."""
    return found if isinstance(found, dict) else {"median": found}


def with_range(found: Row, write: Callable[[float], str] = number) -> str:
    """Median (min to max), or the median where there is no more to tell, as of one round."""
    median = write(found["median"])
    is_spread = "min" in found and found["min"] < found["max"]
    return f"{median} ({write(found['min'])} to {write(found['max'])})" if is_spread else median
