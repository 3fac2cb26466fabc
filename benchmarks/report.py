"""The tables in the documents and the plots, from what was measured: python -m benchmarks report

A table stands in a document between the markers `<!-- benchmarks: FILE PART -->` and `<!-- end -->`: FILE is a file of
results without its .json, and PART one of those of `tables`; a file that holds one table, the cells that "table" has in
it, has no part. What stands there is replaced by what was measured.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import markdown, plots
from benchmarks.results import Row
from benchmarks.tables import PARTS
from benchmarks.worker import ROOT
from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "post-training.md")
NOT_MEASURED = "not measured yet"

BLOCK = re.compile(r"^(<!-- benchmarks: ([^\n]*?) -->\n)((?:(?!<!--).)*?^<!-- end -->$)?", re.MULTILINE | re.DOTALL)
"""A marker, what it names, and what stands there, until and with its end, if it has one."""


def report(results_folder: Path, documents: Sequence[Path]) -> None:
    """Writes the tables of the documents anew, and draws the plots into the folder of results.

    Raises UserError where a marker is wrong, or matplotlib is missing; the documents are unchanged then.
    """
    files = read_results(results_folder)
    texts = {document: document.read_text(encoding="utf-8") for document in documents}
    rendered = {document: render(text, files, document.name) for document, text in texts.items()}
    for name, measured in files.items():
        for path in () if "table" in measured else plots.draw(measured, results_folder / name):
            print(f"{path} drawn", flush=True)
    for document, text in rendered.items():
        if text != texts[document]:
            with replacing(document) as temporary:
                temporary.write_text(text, encoding="utf-8")
        print(f"{document}: {'tables written' if text != texts[document] else 'up to date'}", flush=True)


def read_results(folder: Path) -> dict[str, Row]:
    """The files of results, by their names without .json; other JSON in the folder is passed over."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in files.items() if "rows" in content or "table" in content}


def render(text: str, files: Mapping[str, Row], document: str) -> str:
    """A document with its tables written anew; files: the content of each file of results, by name.

    Raises UserError, which names the document, for a marker that names no file or part, or has no end.
    """

    def block(match: re.Match[str]) -> str:
        marker, name, content = match.groups()
        file, _, part = name.partition(" ")
        if content is None:
            raise UserError(f"{document}: the marker {name!r} has no <!-- end -->")
        if file not in files:
            raise UserError(f"{document}: the marker {name!r} names no file of results; there are: {', '.join(files)}")
        if part not in (parts := tables(files[file])):
            raise UserError(f"{document}: the marker {name!r} names no part; there are: {', '.join(parts)}")
        return f"{marker}{parts[part]}\n<!-- end -->"

    return BLOCK.sub(block, text)


def tables(measured: Row) -> dict[str, str]:
    """The markdown of each part, from the content of a file of results; "not measured yet" where there is no row."""
    if "table" in measured:
        return {"": markdown.table_of(measured["table"])}
    found = {part: make(measured["rows"]) for part, make in PARTS.items()}
    return {part: "\n\n".join(filter(None, blocks)) or NOT_MEASURED for part, blocks in found.items()}
