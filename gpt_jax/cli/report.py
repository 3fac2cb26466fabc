"""A report of tables, bars and marked texts, as text for a terminal or as a page of HTML."""

import html
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax.data.marked import Run, as_text, escaped, in_html

BAR = 40
"""Characters of the longest bar."""


class Table(NamedTuple):
    """Names and texts."""

    title: str
    rows: dict[str, str]


class Bar(NamedTuple):
    """A line of a chart."""

    columns: tuple[str, ...]  # What stands before the bar.
    size: float


class Bars(NamedTuple):
    """A chart of bars, the longest of which has the greatest size."""

    title: str
    rows: list[Bar]

    def lengths(self) -> list[float]:
        """Of each bar, between 0 and 1."""
        longest = max((bar.size for bar in self.rows), default=0) or 1
        return [bar.size / longest for bar in self.rows]


class Passage(NamedTuple):
    """A text in parts, each below a heading of its own."""

    title: str
    parts: list[tuple[str, list[Run]]]


Block = Table | Bars | Passage
Report = Sequence[Block]


def to_text(report: Report, color: bool) -> str:
    """The report for a terminal. color: see marked.as_text."""
    return "\n\n".join("\n".join(_lines(block, color)) for block in report)


def _lines(block: Block, color: bool) -> list[str]:
    title = escaped(block.title)
    lines = [f"\x1b[1m{title}\x1b[0m" if color else title]
    if isinstance(block, Table):
        rows = {escaped(name): escaped(text) for name, text in block.rows.items()}
        width = max(map(_width, rows), default=0) + 2
        return lines + [f"  {name}{' ' * (width - _width(name))}{text}" for name, text in rows.items()]
    if isinstance(block, Bars):
        widths = [max(map(_width, column)) for column in zip(*(bar.columns for bar in block.rows), strict=True)]
        for bar, length in zip(block.rows, block.lengths(), strict=True):
            cells = (" " * (n - _width(cell)) + cell for cell, n in zip(bar.columns, widths, strict=True))
            lines.append(f"  {'  '.join(cells)}  {_bar(length)}".rstrip())
        return lines
    for heading, found in block.parts:
        lines.append(f"\x1b[2m── {heading} ──\x1b[0m" if color else f"── {heading} ──")
        if found:
            lines.append(as_text(found, color))
    return lines


def _width(text: str) -> int:
    """The columns of a terminal that a text takes: two for each sign of Chinese, Japanese and Korean, and emoji."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _bar(length: float) -> str:
    """A bar of up to BAR characters, in eighths of one; whatever is not 0 is seen."""
    eighths = max(round(length * BAR * 8), 1) if length else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #666; --bar: #4a7fb5; --learnt: #c9ecc9; --special: #8a3ab9; }
@media (prefers-color-scheme: dark) { :root { --dim: #999; --bar: #6ea3d8; --learnt: #1e5030; --special: #d3a0f5; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: normal; vertical-align: top; padding: .15rem .8rem .15rem 0; }
tr + tr { border-top: 1px solid var(--line); } .facts th { color: var(--dim); white-space: nowrap; }
.facts td { width: 100%; overflow-wrap: anywhere; }
.bars tr { border: 0; } .bars td { white-space: pre; text-align: right; padding-block: 0; }
.bars td:last-child { width: 100%; padding-right: 0; vertical-align: middle; }
.bars i { display: block; height: .8em; background: var(--bar); }
h3 { font-size: .8rem; font-weight: normal; color: var(--dim); border-top: 1px solid var(--line); margin: .8rem 0 0; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
mark { background: var(--learnt); color: inherit; } pre b { color: var(--special); font-weight: 600; }
"""


def to_page(title: str, report: Report) -> str:
    """The report as a page of HTML that needs nothing else, in light or dark colours as the reader's browser has it."""
    body = "\n".join(f"<h2>{_html(block.title)}</h2>\n{_element(block)}" for block in report)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_html(title)}</title>
<style>{STYLE}</style>
<h1>{_html(title)}</h1>
{body}
</html>
"""


def _html(text: str) -> str:
    return html.escape(escaped(text))


def _element(block: Block) -> str:
    if isinstance(block, Table):
        rows = (f"<tr><th>{_html(name)}<td>{_html(text)}" for name, text in block.rows.items())
        return f'<table class="facts">{"".join(rows)}</table>'
    if isinstance(block, Bars):
        rows = (
            f'<tr>{"".join(f"<td>{_html(cell)}" for cell in bar.columns)}<td><i style="width:{length:.2%}"></i>'
            for bar, length in zip(block.rows, block.lengths(), strict=True)
        )
        return f'<table class="bars">{"".join(rows)}</table>'
    parts = (
        f"<h3>{_html(heading)}</h3>" + f'<pre dir="auto">\n{in_html(found)}</pre>' * bool(found)
        for heading, found in block.parts
    )
    return "\n".join(parts)
