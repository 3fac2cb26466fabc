"""What an environment is, and how one is opened by its name: one of ours, or the user's own."""

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import numpy as np

from gpt_jax.data.messages import Message
from gpt_jax.data.shards import SplitName
from gpt_jax.errors import UserError

R = TypeVar("R")


class Problem(NamedTuple):
    """A problem to be answered."""

    # A text that the answer goes on with; a conversation that ends with the user's message; or tokens, int32 (P,).
    prompt: str | Sequence[Message] | np.ndarray
    fields: Mapping[str, Any]  # What else there is to the problem, from which answers are judged.


class Environment(Protocol):
    """Problems and rewards. It is pure: the same arguments give the same results, in every process."""

    def problems(self, split: SplitName) -> Sequence[Problem]:
        """The problems of a split, of which only len() and [i] are used. The splits share none, as far as possible."""

    def reward(self, problem: Problem, answer: str) -> float:
        """The reward of an answer to one of the problems, from 0 to 1."""


@dataclass(frozen=True)
class Made(Sequence[Problem]):
    """Problems that are made when they are asked for."""

    n: int
    make: Callable[[int], Problem]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Problem:  # type: ignore[override]  # Slices have no use here.
        if not 0 <= number < self.n:
            raise IndexError(f"problem {number} of {self.n}")
        return self.make(number)


class ProblemError(UserError):
    """A problem that cannot be asked, or an answer to it that cannot be judged. The message names it."""


class Problems:
    """The problems of an environment. What that raises becomes an error of one line."""

    def __init__(self, environment: Environment, name: str) -> None:
        self._environment, self._name = environment, name
        self._of: dict[SplitName, Sequence[Problem]] = {}

    def count(self, split: SplitName) -> int:
        """The number of problems in a split. Raises UserError when the environment does not tell, or there is none."""
        try:
            self._of[split] = self._environment.problems(split)
            n = len(self._of[split])
        except Exception as e:
            raise UserError(f"the environment {self._name} raised {raised(e)}") from e
        if not n:
            raise UserError(f"the environment {self._name} has no problem in {split}")
        return n

    def ask(self, split: SplitName, number: int, read: Callable[[Problem], R]) -> tuple[Problem, R]:
        """A problem, and what `read` makes of it. Raises ProblemError when the environment does not give the problem,
        or `read` fails on it."""
        if split not in self._of:
            self.count(split)
        try:
            problem = self._of[split][number]
            return problem, read(problem)
        except Exception as e:
            what = str(e) if isinstance(e, UserError) else f"raised {raised(e)}"
            raise ProblemError(f"problem {number} of {split}: the environment {self._name}: {what}") from e


BUILT_IN = {
    "arithmetic": "gpt_jax.environments.arithmetic:Arithmetic",
    "problems": "gpt_jax.environments.exact_match:ExactMatch",
    "reasoning-gym": "gpt_jax.environments.reasoning_gym:ReasoningGym",
}
"""Our environments. They are opened as the user's own are, which have names of the same form."""

KNOWN = (
    "there are arithmetic, problems (the prepared problem set), reasoning-gym:TASK, and your own as MODULE:ATTRIBUTE "
    "or FILE.py:ATTRIBUTE"
)


def open_environment(name: str, options: Sequence[str] = (), data: str = "") -> Environment:
    """The environment of a name: see KNOWN. A module may be one in the current folder, and the attribute is a class or
    function, which is called with the options as keywords.

    options: NAME=VALUE, where the value is JSON, or else a text. data: the data folder, which only "problems" reads.
    Raises UserError when there is no such environment, when it cannot be imported, does not take an option, or fails,
    and when what it makes is no environment.
    """
    target, given = name, dict[str, Any]()
    if name == "problems":
        target, given = BUILT_IN[name], {"data": data}
    elif name in ("reasoning-gym", "reasoning-gym:"):
        raise UserError("reasoning-gym needs a task: name one as reasoning-gym:TASK, such as reasoning-gym:chain_sum")
    elif name.startswith("reasoning-gym:"):
        target, given = BUILT_IN["reasoning-gym"], {"task": name.partition(":")[2]}
    elif name in BUILT_IN:
        target = BUILT_IN[name]
    module, _, attribute = target.rpartition(":")
    if not (module and attribute):
        near = difflib.get_close_matches(target, BUILT_IN, n=1)
        raise UserError(f"there is no environment {name!r}{f'; did you mean {near[0]}?' if near else ''}; {KNOWN}")
    make = _attribute(_module(module, name), attribute, name)
    keywords = _keywords(name, make, given, parsed_options(options))
    try:
        environment = make(**given, **keywords)
    except UserError as e:
        raise UserError(f"the environment {name}: {e}") from e
    except (Exception, SystemExit) as e:
        raise UserError(f"the environment {name} raised {raised(e)} when it was made") from e
    if missing := [method for method in ("problems", "reward") if not callable(getattr(environment, method, None))]:
        kind = type(environment).__name__
        raise UserError(
            f"the environment {name} is a {kind} without a method {missing[0]}; it needs problems and reward"
        )
    return cast(Environment, environment)


def parsed_options(options: Sequence[str]) -> dict[str, Any]:
    """The values of options by their names. Raises UserError for one that is not NAME=VALUE, or is given twice."""
    values: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(f"the option {option!r} of the environment is not of the form NAME=VALUE")
        if name in values:
            raise UserError(f"the option {name} of the environment is given twice")
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:  # NaN and Infinity, which are not JSON.
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


def unknown_option(option: str, taken: Sequence[str]) -> UserError:
    """Says that there is no such option, and which ones there are."""
    near = difflib.get_close_matches(option, taken, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"there is no option {option}{hint}; it takes {', '.join(taken) or 'none'}")


def raised(e: BaseException) -> str:
    """An exception in one line: its class, its message, and the last place in code that belongs to no library."""
    frames = [frame for frame in traceback.extract_tb(e.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = " ".join(str(e).split())
    return f"{type(e).__name__}{f': {message:.500}' if message else ''}{place}"


LIBRARIES = (
    "<",  # Such as <frozen importlib._bootstrap>.
    str(Path(__file__).parents[1]) + os.sep,
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
)
"""How the names of files begin in which the user does not look for a mistake."""


def _module(module: str, name: str) -> ModuleType:
    """Imports a module by its name, or from a file."""
    try:
        if module.endswith(".py"):
            return _from_file(Path(module))
        if "" not in sys.path and str(Path.cwd()) not in sys.path:  # As in an installed command, unlike `python -m`.
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(module)
    except UserError as e:
        raise UserError(f"the environment {name}: {e}") from e
    except (Exception, SystemExit) as e:
        raise UserError(f"the environment {name}: {module} cannot be imported: {raised(e)}") from e


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_environment_{path.stem}", path)
    assert spec is not None  # As for every name that ends in .py.
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Where dataclasses look for it.
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> Callable[..., Any]:
    public = [known for known in dir(module) if not known.startswith("_") and callable(getattr(module, known))]
    make = getattr(module, attribute, None)
    if make is None:
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"the environment {name}: the module has no {attribute}{hint}")
    if not callable(make):
        raise UserError(f"the environment {name}: {attribute} is of type {type(make).__name__}, no class or function")
    return cast(Callable[..., Any], make)


def _keywords(name: str, make: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options. Raises UserError for one that `make` does not take, or without which it cannot be called."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # Of a class in C, which says by itself what it does not take.
        return options
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p.name for p in parameters.values() if p.kind in named and p.name not in given]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option in given or (option not in taken and not takes_any):
            raise UserError(f"the environment {name}: {unknown_option(option, taken)}")
    needed = [option for option in taken if parameters[option].default is inspect.Parameter.empty]
    if missing := [option for option in needed if option not in options]:
        raise UserError(f"the environment {name} needs the option {missing[0]}; give it as {missing[0]}=VALUE")
    return options
