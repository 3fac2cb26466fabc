"""Environments by their names: ours and the user's own, their options, and one clear line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.environments.environment import open_environment, parsed_options
from gpt_jax.errors import UserError
from tests.commands import ROOT

MINE = """
from dataclasses import dataclass

@dataclass
class Mine:
    n: "int" = 3
    text: str = ""

    def __post_init__(self):
        if self.n < 0:
            raise ValueError("n must be\\nat least 0")

    def problems(self, split):
        return [(self.text, {}) for _ in range(self.n)]

    def reward(self, problem, answer):
        return float(answer == problem[0])

def needs(path, *, n=1):
    return Mine(n, path)

def anything(**options):
    return Mine(len(options))

def exits():
    raise SystemExit(3)

def half():
    return half

half.problems = half
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
names = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)


@given(st.dictionaries(names, values | st.lists(values)))
def test_values_are_json(options: dict[str, Any]) -> None:
    assert parsed_options([f"{name}={json.dumps(value)}" for name, value in options.items()]) == options


@given(names, st.text())
def test_or_texts(name: str, text: str) -> None:
    [(found, value)] = parsed_options([f"{name}={text}"]).items()
    try:
        wanted = json.loads(text)
    except ValueError:
        wanted = text
    assert (found, repr(value)) == (name, repr(text if text.strip() in ("NaN", "Infinity", "-Infinity") else wanted))


@pytest.mark.parametrize("text", ["+-", "NaN", "[1, Infinity]", "a=b", "", "True", "'x'", "[" * 100_000])
def test_texts_that_are_no_json(text: str) -> None:
    assert parsed_options([f"a={text}"]) == {"a": text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["digits"], "the option 'digits' of the environment is not of the form NAME=VALUE"),
        (["=3"], "the option '=3' of the environment is not of the form NAME=VALUE"),
        (["a b=3"], "the option 'a b=3' of the environment is not of the form NAME=VALUE"),
        (["a=3", "a=3"], "the option a of the environment is given twice"),
    ],
)
def test_options_of_no_form(options: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        parsed_options(options)
    assert str(e.value) == message


def test_a_file_of_the_user(mine: Path) -> None:
    environment: Any = open_environment(f"{mine}:Mine", ["n=2", "text=7x"])
    assert (environment.n, environment.text) == (2, "7x")
    environment = open_environment(f"{mine}:needs", ["path=[1]"])
    assert (environment.n, environment.text) == (1, [1])
    assert len(open_environment(f"{mine}:anything", ["a=1", "b=2"]).problems("train")) == 2


def test_a_module_of_the_current_folder(mine: Path) -> None:
    """Also in an installed command, which does not search that folder by itself."""
    code = "from gpt_jax.environments.environment import open_environment; print(open_environment('mine:Mine').n)"
    installed = f"import sys; sys.path.append({str(ROOT)!r}); {code}"
    for command in (["-c", code], ["-I", "-c", installed]):
        done = subprocess.run([sys.executable, *command], cwd=mine.parent, capture_output=True, text=True, check=True)
        assert done.stdout == "3\n"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "arithmetc",
            [],
            "there is no environment 'arithmetc'; did you mean arithmetic?; there are arithmetic, problems",
        ),
        (
            "",
            [],
            "there is no environment ''; there are arithmetic, problems (the prepared problem set), ",
        ),
        ("a:", [], "there is no environment 'a:'; there are "),
        (":b", [], "there is no environment ':b'; there are "),
        (
            "reasoning-gym",
            [],
            "reasoning-gym needs a task: name one as reasoning-gym:TASK, such as reasoning",
        ),
        (
            "arithmetic",
            ["digit=3"],
            "the environment arithmetic: there is no option digit; did you mean digits?; it",
        ),
        ("arithmetic", ["digits=0"], "the environment arithmetic: digits = 0 is not possible: it must be 1 to 9"),
        ("problems", ["data=x"], "the environment problems: there is no option data; it takes field, last_number"),
        (
            "no_such:X",
            [],
            "the environment no_such:X: no_such cannot be imported: ModuleNotFoundError: ",
        ),
        ("no_such.py:X", [], "the environment no_such.py:X: there is no file no_such.py"),
        ("json:dmps", [], "the environment json:dmps: the module has no dmps; did you mean dumps?"),
    ],
)
def test_what_is_refused(name: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        open_environment(name, options)
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("Mine", ["n=-1"], " raised ValueError: n must be at least 0 (mine.py, line 11) when it was made"),
        ("exits", [], " raised SystemExit: 3 (mine.py, line 26) when it was made"),
        ("needs", [], " needs the option path; give it as path=VALUE"),
        ("Mine", ["m=1"], ": there is no option m; it takes n, text"),
        ("number", [], ": number is of type int, no class or function"),
        ("half", [], " is a function without a method reward; it needs problems and reward"),
    ],
)
def test_what_is_refused_of_a_file(mine: Path, attribute: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        open_environment(f"{mine}:{attribute}", options)
    assert str(e.value) == f"the environment {mine}:{attribute}{message}"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such", "ModuleNotFoundError: No module named 'no_such' (broken.py, line 2)"),
        ("x = ", "SyntaxError: invalid syntax (broken.py, line 2)"),
        ("raise SystemExit", "SystemExit (broken.py, line 2)"),
        ("import json; json.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(f"\n{code}\n")
    with pytest.raises(UserError) as e:
        open_environment(f"{path}:X")
    assert str(e.value).startswith(f"the environment {path}:X: {path} cannot be imported: {message}")
    assert "(broken.py, line 2)" in str(e.value)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "gpt_jax.environments.reasoning_gym", raising=False)
    with pytest.raises(UserError, match=r"reasoning-gym is not installed .*: pip install 'gpt-jax\[rl\]'$"):
        open_environment("reasoning-gym:chain_sum")
