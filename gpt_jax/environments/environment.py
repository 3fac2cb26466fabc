"""Environments: problems, and the rewards of answers to them; those that come with the project, and the user's own."""

import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt_jax.data.shards import SplitName
from gpt_jax.errors import UserError

Prompt = str | Sequence[Mapping[str, Any]] | np.ndarray
"""A text that the answer goes on with; a conversation (role, content) that ends with the user's message; or the tokens
of a prompt, int32 (P,)."""


class Problem(NamedTuple):
    """A problem: what the model reads, and what else there is to it, from which answers are judged."""

    prompt: Prompt
    fields: Mapping[str, Any]


class Problems(Protocol):
    """Problems with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


@dataclass(frozen=True)
class Made:
    """See Problems: n of them, each made when it is asked for."""

    n: int
    make: Callable[[int], Problem]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.n:
            raise IndexError(f"problem {index} of {self.n}")
        return self.make(index)


class Environment(Protocol):
    """What a model is to learn by rewards. The same arguments give the same results, in every process."""

    def problems(self, split: SplitName) -> Problems:
        """The problems to learn from, or those that are held out."""

    def reward(self, problem: Problem, answer: str) -> float:
        """How good an answer is, from 0 to 1. The answer lacks the token that ends it."""


def open_environment(name: str, options: Sequence[str] = (), data: str = "") -> Environment:
    """The environment of this name: arithmetic, reasoning-gym:TASK, problems (the prepared set in the folder `data`),
    or MODULE:NAME or FILE.py:NAME, the user's own, which is called with the options.

    options: NAME=VALUE; a value that can be read as JSON is that, others are strings. Raises UserError when there is no
    such environment, when it does not take the options, and when it cannot be made of them.
    """
    given = dict(parse_option(option) for option in options)
    kind, _, rest = name.partition(":")
    if kind == "reasoning-gym" and rest:
        given = {"task": rest, **given}
    elif kind == "problems" and not rest:
        given = {"folder": data, **given}
    make = factory(name, kind, rest)
    try:
        inspect.signature(make).bind(**given)
    except TypeError as e:
        known = ", ".join(p for p in inspect.signature(make).parameters if p not in ("task", "folder"))
        raise UserError(
            f"the environment {name} does not take these options ({e}); it has: {known or 'none'}"
        ) from None
    try:
        environment = make(**given)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"the environment {name} cannot be made: {described(e)}") from e
    for method in ("problems", "reward"):
        if not callable(getattr(environment, method, None)):
            raise UserError(f"the environment {name} has no method {method}; see gpt_jax.environments.environment")
    return environment


def parse_option(option: str) -> tuple[str, Any]:
    """The name and the value of an option. Raises UserError."""
    name, equals, value = option.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"the option {option!r} of an environment is not of the form NAME=VALUE, such as digits=2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def factory(name: str, kind: str, rest: str) -> Callable[..., Environment]:
    """What makes the environment. Raises UserError."""
    built_in = {"arithmetic": "Arithmetic", "problems": "ExactMatch", "reasoning-gym": "ReasoningGym"}
    if (kind == "reasoning-gym") == bool(rest) and kind in built_in:
        module: ModuleType = importlib.import_module(f"gpt_jax.environments.{kind.replace('-', '_')}")
        return getattr(module, built_in[kind])
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        near = difflib.get_close_matches(name, built_in, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"there is no environment {name}; there are arithmetic, problems, reasoning-gym:TASK, and your own as "
            f"MODULE:NAME or FILE.py:NAME{hint}"
        )
    try:
        module = imported(place)
    except Exception as e:
        raise UserError(f"the environment {name} cannot be imported: {described(e)}") from e
    if not callable(made := getattr(module, attribute, None)):
        raise UserError(f"the environment {name}: {place} has no class or function {attribute}")
    return made


def imported(place: str) -> ModuleType:
    """A module by its name, also in the working directory, or by its file."""
    if not place.endswith(".py"):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        return importlib.import_module(place)
    name = f"gpt_jax_environment_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def described(e: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(e.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(e).split())[:500]
    return f"{type(e).__name__}{f': {text}' if text else ''}{where}"
