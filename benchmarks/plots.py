"""The plots of a machine's results. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Row
from benchmarks.tables import SIZED, scaled
from gpt_jax.errors import UserError
from gpt_jax.files import replacing

STYLES: Mapping[str, Row] = {
    "gpt_jax": {"color": "#0072B2", "marker": "o", "label": "gpt_jax"},
    "pytorch, eager": {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "PyTorch, eager"},
    "pytorch, compiled": {"color": "#CC79A7", "marker": "^", "linestyle": "-.", "label": "PyTorch, compiled"},
    "gpt_jax, own recipe": {"color": "#009E73", "marker": "D", "linestyle": ":", "label": "gpt_jax, own recipe"},
    "layers scanned": {"color": "#009E73", "marker": "D", "label": "gpt_jax, layers scanned"},
    "layers unrolled": {"color": "#0072B2", "marker": "o", "linestyle": "--", "label": "gpt_jax, layers unrolled"},
}

KEYS, GAP = ("median", "min", "max"), {"median": float("nan")}

PANELS = {
    "context": "context (tokens)",
    "batch": "batch (sequences)",
    "depth": "depth (layers)",
    "compile": "depth (layers)",
}


def draw(measured: Row, stem: Path) -> list[Path]:
    """Draws STEM-scaling.png and STEM-learning.png, as far as their rows are there; returns the files.

    measured: the content of a file of results. Raises UserError where matplotlib is needed and missing.
    """
    rows = measured["rows"]
    title = measured["machine"]["name"]
    drawn = []
    if any(f"scale/{axis}" in rows for axis in PANELS):
        drawn.append(save(scaling(rows, title), stem.with_name(f"{stem.name}-scaling.png")))
    learned = [row for name, row in rows.items() if name.startswith("learn/")]
    if learned:
        drawn.append(save(learning(learned[0], title), stem.with_name(f"{stem.name}-learning.png")))
    return drawn


def figure(**options: Any) -> Any:
    """A figure without a window. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing the plots needs matplotlib: pip install -e ".[bench]"') from None
    return Figure(layout="constrained", **options)


def scaling(rows: Mapping[str, Row], title: str) -> Any:
    """Four panels, in powers of two along and of ten up: ms a step against context, batch and depth; seconds compiling.

    A panel whose row is not there says so; a contestant that failed at a point has a gap there.
    """
    drawn = figure(figsize=(9, 6.6))
    drawn.suptitle(title)
    for axes, (axis, label) in zip(drawn.subplots(2, 2).flat, PANELS.items(), strict=True):
        row = rows.get(f"scale/{axis}")
        axes.set_xlabel(label)
        axes.set_ylabel("s to compile" if axis == "compile" else "ms a training step")
        if row is None:
            axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
            continue
        xs, lines = [point["x"] for point in row["points"]], scaled(axis, row)
        for name in SIZED.values():
            spreads = [line.contestants[name]["time"] if name in line.contestants else GAP for line in lines]
            median, low, high = (np.array([found.get(key, found["median"]) for found in spreads]) for key in KEYS)
            if not np.isnan(median).all():
                axes.errorbar(xs, median, yerr=[median - low, high - median], capsize=3, **STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(lambda value, _: plain(value, _) if leading_digit(value) in "25" else "")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return drawn


def learning(row: Row, title: str) -> Any:
    """Validation loss against seconds since the start of each process, and the loss aimed at."""
    drawn = figure(figsize=(7.5, 4.6))
    axes = drawn.subplots()
    for name, found in row["contestants"].items():
        times, _, losses = zip(*found["curve"], strict=True)
        axes.plot(times, losses, **STYLES.get(name, {"label": name}))
    axes.axhline(row["target"], color="black", linewidth=1, label=f"target: {row['target']:g}")
    axes.set_xlim(left=0)
    axes.set_title(title)
    axes.set_xlabel("seconds since the start of the process")
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def save(drawn: Any, path: Path) -> Path:
    """Writes a figure as a PNG, which is the same for the same data and matplotlib."""
    with replacing(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return path


def plain(value: float, _: object = None) -> str:
    """A tick's number without an exponent."""
    return f"{value:,.10g}"


def leading_digit(value: float) -> str:
    """The first digit of a positive number."""
    return f"{value:e}"[0]
