"""The plots of a machine's results. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import as_spread
from benchmarks.results import Row
from benchmarks.tables import of_axis
from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing

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
    if any(of_axis(rows, axis) for axis in PANELS):
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


def scaling(rows: dict[str, Row], title: str) -> Any:
    """Four panels, in powers of two along and of ten up: ms a step against context, batch and depth; seconds compiling.

    A panel without rows says so; a contestant that failed at a size has a gap there.
    """
    figure = make_figure(figsize=(9, 6.6))
    figure.suptitle(title)
    for axes, (axis, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        kind, unit = ("compile_seconds", "s to compile") if axis == "compile" else ("step_ms", "ms a training step")
        axes.set(xlabel=label, ylabel=unit, yscale="log")
        if not (races := of_axis(rows, axis)):
            axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
            continue
        xs = [int(race.name) for race in races]
        for name in dict.fromkeys(name for race in races for name in race.figures):
            found = [as_spread(race.figures.get(name, {}).get(kind, np.nan)) for race in races]
            median, low, high = (np.array([x.get(k, x["median"]) for x in found]) for k in ("median", "min", "max"))
            axes.errorbar(xs, median, yerr=[median - low, high - median], capsize=3, **STYLES[name])
        axes.set_xscale("log", base=2)
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
    axes.set(title=title, xlabel="seconds since the start of the process", ylabel="validation loss (nats a token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
