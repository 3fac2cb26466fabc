"""The README's tables and the plots, from what was measured: python -m benchmarks report

A table stands in the README between the markers `<!-- benchmarks: FILE PART -->` and `<!-- end -->`: FILE is a file of
results without its .json, and PART one of those of `tables`; a file of ALONE has one table only, and no part. What
stands there is replaced by what was measured.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks import plots
from benchmarks.alone import ALONE
from benchmarks.results import Row
from benchmarks.tables import PARTS
from gpt_jax.errors import UserError
from gpt_jax.files import replacing

NOT_MEASURED = "not measured yet"

MARKER = re.compile(r"^<!-- benchmarks: ([^\n]*?) -->$", re.MULTILINE)
BLOCK = re.compile(r"^(<!-- benchmarks: ([^\n]*?) -->\n)(?:(?!<!--).)*?(^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def report(results_folder: Path, readme: Path | None) -> None:
    """Regenerates the tables of the README, if there is one to write, and draws the plots into the folder of results.

    Raises UserError where a marker in the README is wrong, or matplotlib is missing; the README is unchanged then.
    """
    files = read_results(results_folder)
    text = readme.read_text(encoding="utf-8") if readme else ""
    rendered = render(text, files)
    for name, measured in files.items():
        for path in () if name in ALONE else plots.draw(measured, results_folder / name):
            print(f"{path} drawn", flush=True)
    if readme is None:
        return
    if rendered != text:
        with replacing(readme) as temporary:
            temporary.write_text(rendered, encoding="utf-8")
    print(f"{readme}: {'tables written' if rendered != text else 'up to date'}", flush=True)


def read_results(folder: Path) -> dict[str, Row]:
    """The files of results, by their names without .json; other JSON in the folder is passed over."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in files.items() if "rows" in content or name in ALONE}


def render(readme_text: str, files: Mapping[str, Row]) -> str:
    """The README with its tables regenerated; files: the content of each file of results, by name.

    Raises UserError for a marker that names no file or part, or has no end.
    """

    def block(match: re.Match[str]) -> str:
        marker, name, end = match.groups()
        file, _, part = name.partition(" ")
        if file not in files:
            raise UserError(f"README: the marker {name!r} names no file of results; there are: {', '.join(files)}")
        parts = {"": ALONE[file](files[file])} if file in ALONE else tables(files[file])
        if part not in parts:
            raise UserError(f"README: the marker {name!r} names no part; there are: {', '.join(parts)}")
        return f"{marker}{parts[part]}\n{end}"

    ended = {match.start() for match in BLOCK.finditer(readme_text)}
    for marker in MARKER.finditer(readme_text):
        if marker.start() not in ended:
            raise UserError(f"README: the marker {marker[1]!r} has no <!-- end -->")
    return BLOCK.sub(block, readme_text)


def tables(rows_file: Row) -> dict[str, str]:
    """The markdown of each part, from the content of a file of results; "not measured yet" where there is no row."""
    rows = rows_file["rows"]
    return {
        part: "\n\n".join(filter(None, make(rows_file["machine"], rows))) or NOT_MEASURED
        for part, make in PARTS.items()
    }
