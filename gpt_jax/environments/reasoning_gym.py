"""The tasks of the package reasoning-gym (https://github.com/open-thought/reasoning-gym), more than a hundred.

The answers are judged by its own rules, as they are. Most give a part of the reward to an answer that has the right one
in it, some 0.01 or 0.05 to any answer, and game_of_life_halting all of it to a text without a verdict where "False" is
right.

Nine tasks evaluate answers as Python, by eval or by SymPy's parser. They are refused unless the option `evaluates` is
true: what a model writes to them should be judged where it can do no harm. An answer such as 9**9**9**9 hangs there,
which is an error of `Judges`.
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from gpt_jax.config.check import check
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Made, Problem, raised, unknown_option
from gpt_jax.errors import UserError

MAX_PROBLEMS = 1 << 30
"""In a split. The tasks seed problem i with seed + i, so the seeds of the splits must be so far apart."""

HOW_TO_ANSWER = "Write the final answer between <answer> and </answer>."

EVALUATING = (
    *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
    *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
)
"""Tasks that evaluate answers: the first line by eval, the second one by SymPy."""

BY_HASH_ORDER = (
    *("codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note"),
    "word_ladder",
)
"""Tasks whose problems depend on the order of sets, which is another one in every process unless PYTHONHASHSEED is set.
It does so in 0.1.25, by the first 300 problems of each task, or as many as it makes in 1.5 s."""


class ReasoningGym:
    """The problems of a task, as conversations. The splits have different seeds; where a task has few problems, they
    share some."""

    def __init__(
        self,
        task: str,
        tags: bool = True,
        n_train: int = 100_000,
        n_val: int = 1_000,
        seed: int = 0,
        evaluates: bool = False,
        **options: Any,
    ) -> None:
        """tags: whether the final answer stands between <answer> and </answer>; else it is the whole answer. evaluates:
        whether the task may evaluate answers as Python. options: those of the task itself. Raises UserError for an
        unknown task, and for options that it does not take."""
        if task not in (known := tasks()):
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"reasoning-gym has no task {task!r}; {hint}")
        check(type(tags) is bool, "tags", tags, "true or false")
        for name, n in (("n_train", n_train), ("n_val", n_val)):
            check(type(n) is int and 1 <= n <= MAX_PROBLEMS, name, n, f"1 to {MAX_PROBLEMS:,}")
        check(type(seed) is int and 0 <= seed <= MAX_PROBLEMS, "seed", seed, f"0 to {MAX_PROBLEMS:,}")
        check(type(evaluates) is bool, "evaluates", evaluates, "true or false")
        if task in EVALUATING and not evaluates:
            raise UserError(f"{task} runs what the model answers as Python; allow it by the option evaluates=true")
        if task in BY_HASH_ORDER and (os.environ.get("PYTHONHASHSEED") or "random") == "random":
            raise UserError(f"{task} makes other problems in every process; set PYTHONHASHSEED=0, and start again")
        self._tags = tags
        self._splits = {
            "train": _dataset(task, options, seed, n_train),
            "val": _dataset(task, options, seed + MAX_PROBLEMS, n_val),
        }

    def problems(self, split: SplitName) -> Sequence[Problem]:
        """See Environment."""
        dataset = self._splits[split]
        return Made(len(dataset), partial(self._problem, dataset))

    def _problem(self, dataset: Any, number: int) -> Problem:
        entry = dataset[number]
        content = f"{entry['question']}\n\n{HOW_TO_ANSWER}" if self._tags else entry["question"]
        return Problem([{"role": "user", "content": content}], entry)

    def reward(self, problem: Problem, answer: str) -> float:
        """The score of the task, between 0 and 1. It is 0.0 without a final answer, and where the task fails to read
        one, as some do that expect a number."""
        if self._tags:
            _, found, answer = answer.rpartition("</answer>")[0].rpartition("<answer>")
            if not found:
                return 0.0
        try:
            score = self._splits["train"].score_answer(answer.strip(), problem.fields)
        except MemoryError:  # That is no property of the answer.
            raise
        except Exception:
            return 0.0
        return min(max(float(score), 0.0), 1.0)


def tasks() -> list[str]:
    """The names of the tasks, but for the one that is made of others, by objects that are no options."""
    return sorted({*registered()} - {"composite"})


def registered() -> dict[str, Any]:
    """The package's own table. It is imported here, since it changes how warnings are filtered."""
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as e:
        raise UserError(f"reasoning-gym is not installed ({e}): pip install 'gpt-jax[rl]'") from None
    return dict(factory.DATASETS)


def _dataset(task: str, options: dict[str, Any], seed: int, size: int) -> Any:
    make, config = registered()[task]
    taken = [field.name for field in dataclasses.fields(config) if field.name not in ("seed", "size")]
    for option in options:
        if option not in taken:
            raise unknown_option(option, ["tags", "n_train", "n_val", "seed", "evaluates", *taken])
    try:
        dataset = make(config(**options, seed=seed, size=size))
        entry = dataset[0]
        if entry["answer"] is not None:  # Of some tasks, several answers are right, and none is the one.
            dataset.score_answer(entry["answer"], entry)
    except Exception as e:
        raise UserError(f"the task {task} does not work with these options: {raised(e)}") from e
    return dataset
