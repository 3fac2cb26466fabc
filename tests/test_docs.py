"""The README and docs/ against what is there: links, flags, the order of imports, lines."""

import ast
import contextlib
import functools
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_jax.cli.main import COMMANDS, main
from tests.commands import ROOT
from tests.mutations import LIST, changed, read_list

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_THE_COMMANDS_NOW = {
    "CHANGELOG.md": re.compile("--.*"),  # Flags come and go.
    "speed.md": re.compile("--.*"),  # Its flags are those of `python -m benchmarks`.
    "evaluate.md": re.compile("--model_args"),  # lm_eval's.
}

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:-m gpt_jax |\bgpt-jax )([a-z]+)|\b(train|sample)\.py")
CORE = re.compile(r"^\| \[[^\]]+\]\((gpt_jax/[^)]+)\) \| (\d+) \|", re.MULTILINE)
ROOM = re.compile(r"\[([a-z]+)/?\]\((?:\.\./)?gpt_jax/[a-z]+(?:\.py)?\)")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose_of(document: Path) -> str:
    return FENCE.sub("", text_of(document))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(document: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands in a document's code, each with the flags that it is given."""
    code = "".join(code.replace("\\\n", " ") for language, code in FENCE.findall(text_of(document)) if not language)
    for line in re.split(r"\n|&&", code):
        if "python" in line and (call := CALL.search(line)):
            words = shlex.split(line[call.end() :])
            yield call[1] or call[2], [word.partition("=")[0] for word in words if word.startswith("--")]


@functools.cache
def flags_of(command: str) -> set[str]:
    """The flags that a command's --help tells."""
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit):
            main([command, "--help"])
    return set(re.findall(r"--[a-z0-9.-]*[a-z0-9]", out.getvalue()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    broken = []
    for target in LINK.findall(prose_of(document)):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not target.startswith("https://") and (not path.exists() or (anchor and anchor not in anchors(path))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(document: Path) -> None:
    unknown = [(name, flag) for name, flags in calls(document) for flag in flags if flag not in flags_of(name)]
    assert not unknown, "in code"
    others = NOT_THE_COMMANDS_NOW.get(document.name, re.compile("(?!)"))
    known = set().union(*map(flags_of, COMMANDS))
    named = {
        flag for code in re.findall(r"`([^`\n]+)`", prose_of(document)) for flag in re.findall(r"--[\w.-]+\w", code)
    }
    assert not {flag for flag in named - known if not others.fullmatch(flag)}, "in prose"


def test_every_command_is_shown() -> None:
    shown = {name for document in DOCUMENTS for name, _ in calls(document)}
    assert shown == set(COMMANDS)


def test_python_in_the_documents_is_python() -> None:
    blocks = [code for d in DOCUMENTS for language, code in FENCE.findall(text_of(d)) if language == "python"]
    assert blocks
    for code in blocks:
        ast.parse(code)


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 160


def test_the_core_has_as_many_lines_as_the_readme_says() -> None:
    """The README rounds to tens; a file may have five lines more or fewer before it has to be counted anew."""
    core = [
        (name, int(stated), len(text_of(ROOT / name).splitlines())) for name, stated in CORE.findall(text_of(README))
    ]
    n_files, total = re.findall(r"These (\d+) files are about ([\d,]+) lines", text_of(README))[0]
    assert len(core) == int(n_files)
    assert not [(name, stated, lines) for name, stated, lines in core if abs(stated - lines) > 5]
    assert abs(sum(lines for _, _, lines in core) - int(total.replace(",", ""))) <= 100


def test_the_order_of_imports_is_written_down_as_it_is() -> None:
    """In docs/architecture.md, CONTRIBUTING.md and the README's map: that of the contract in pyproject.toml."""
    rows = re.findall(r"^\| (\[[^|]+) \|", text_of(ARCHITECTURE).partition("\n## What always holds")[0], re.MULTILINE)
    order = [room for row in rows for room in ROOM.findall(row)]
    package = ROOT / "gpt_jax"
    there = {p.stem for p in package.iterdir() if (p.is_dir() or p.suffix == ".py") and not p.name.startswith("__")}
    assert set(order) == there
    [listed] = re.findall(r"\*\*Imports run one way\*\*:(.*?);", text_of(CONTRIBUTING), re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == order
    house = text_of(README).partition("## The house")[2].partition("\n## ")[0]
    assert [room for row in re.findall(r"^\| (\[[^|]+) \|", house, re.MULTILINE) for room in ROOM.findall(row)] == order

    contract = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    assert sorted(room for layer in contract for room in layer.split(" | ")) == sorted(order)
    layer_of = {room: i for i, layer in enumerate(reversed(contract)) for room in layer.split(" | ")}
    assert [layer_of[room] for room in order] == sorted(layer_of[room] for room in order)


def test_every_change_that_tests_should_notice_can_be_made() -> None:
    """The list is tried by hand, since that takes hours; here, that the code has what it changes."""
    listed = read_list(LIST.read_text(encoding="utf-8"))
    assert [entry.name for entry in listed if changed(entry, ROOT) is None] == []
