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

PANELS = {"context": "context (tokens)", "batch": "batch (sequences)", "depth": "depth (layers)"}
PANELS["compile"] = PANELS["depth"]


def draw(measured: Row, stem: Path) -> list[Path]:
    """Draws STEM-scaling.png and STEM-learning.png, as far as their rows are there; returns the files.

    measured: the content of a file of results. Raises UserError where matplotlib is needed and missing.
    """
    rows, title = measured["rows"], measured["machine"]["name"]
    figures = {}
    if any(f"scale/{axis}" in rows for axis in PANELS):
        figures["scaling"] = scaling(rows, title)
    if learned := [row for name, row in rows.items() if name.startswith("learn/")]:
        figures["learning"] = learning(learned[0], title)
    drawn = []
    for name, figure in figures.items():
        drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
        with replacing(drawn[-1]) as temporary:  # The file is the same for the same data and matplotlib.
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return drawn


def make_figure(**options: Any) -> Any:
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
    figure = make_figure(figsize=(9, 6.6))
    figure.suptitle(title)
    for axes, (axis, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axes.set_xlabel(label)
        axes.set_ylabel("s to compile" if axis == "compile" else "ms a training step")
        if (row := rows.get(f"scale/{axis}")) is None:
            axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
            continue
        xs, lines = [point["x"] for point in row["points"]], scaled(axis, row)
        for name in SIZED.values():
            times = [line.contestants.get(name, {}).get("time", {"median": np.nan}) for line in lines]
            median, low, high = (np.array([t.get(k, t["median"]) for t in times]) for k in ("median", "min", "max"))
            if not np.isnan(median).all():
                axes.errorbar(xs, median, yerr=[median - low, high - median], capsize=3, **STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        # Of the smaller ticks, those at 2 and 5 have a number.
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "25" else "")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return figure


def learning(row: Row, title: str) -> Any:
    """Validation loss against seconds since the start of each process, and the loss aimed at."""
    figure = make_figure(figsize=(7.5, 4.6))
    axes = figure.subplots()
    for name, found in row["contestants"].items():
        times, _, losses = zip(*found["curve"], strict=True)
        axes.plot(times, losses, **STYLES.get(name, {"label": name}))
    axes.axhline(row["target"], color="black", linewidth=1, label=f"target: {row['target']:g}")
    axes.set_xlim(left=0)
    axes.set(title=title, xlabel="seconds since the start of the process", ylabel="validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
