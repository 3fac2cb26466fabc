"""The tasks of the package reasoning-gym: a hundred generators of problems, each with its own judge."""

import re
from typing import Any

from gpt_jax.config import check
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Made, Problem, described
from gpt_jax.errors import UserError

HOW = "Give the final answer, and nothing else, between <answer> and </answer>."
BETWEEN_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
HELD_OUT = 2**40
"""Added to the seed of the held-out problems, of which each has the seed plus its number."""


class ReasoningGym:
    """A task, with options of its own. The rewards are the task's scores, of which some are above 0 for wrong answers,
    such as 0.01. An answer that the task's judge cannot read is worth nothing."""

    def __init__(
        self, task: str, tags: bool = True, n_train: int = 10_000, n_val: int = 500, seed: int = 0, **options: Any
    ) -> None:
        """tags: the final answer stands between <answer> and </answer>; else, all of the answer is scored. Raises
        UserError when the package is not installed, or has no such task, or the task does not take the options."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise UserError("reasoning-gym is not installed: pip install 'gpt-jax[rl]'") from None
        if task not in DATASETS:
            raise UserError(f"reasoning-gym has no task {task}; it has {', '.join(sorted(DATASETS))}")
        for name, n in (("n_train", n_train), ("n_val", n_val)):
            check(type(n) is int and n >= 1, name, n, "1 or more")
        self.tags = tags
        try:
            self._datasets = {
                split: reasoning_gym.create_dataset(task, size=n, seed=first, **options)
                for split, n, first in (("train", n_train, seed), ("val", n_val, seed + HELD_OUT))
            }
        except (TypeError, AssertionError, ValueError) as e:
            raise UserError(f"the environment reasoning-gym:{task} does not take these options: {described(e)}") from e

    def problems(self, split: SplitName) -> Made:
        """See Environment."""
        entries = self._datasets[split]

        def problem(index: int) -> Problem:
            entry = entries[index]
            question = f"{entry['question']}\n{HOW}" if self.tags else entry["question"]
            return Problem([{"role": "user", "content": question}], entry)

        return Made(len(entries), problem)

    def reward(self, problem: Problem, answer: str) -> float:
        """See Environment."""
        if self.tags:
            found = BETWEEN_TAGS.findall(answer)
            if not found:
                return 0.0
            answer = found[-1]
        try:
            score = self._datasets["train"].score_answer(answer.strip(), entry=problem.fields)
        except Exception:
            return 0.0
        return min(max(float(score), 0.0), 1.0)
