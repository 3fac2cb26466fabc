"""An environment for `tune`, whose problems and rewards cost next to nothing: to write many letters."""

import random
import string
from collections.abc import Sequence

from gpt_jax.environments.environment import Made, Problem

PROMPT = 16
"""The letters of a problem, each of which is a byte."""


class Letters:
    """Each problem is random letters, by its number. The reward is the share of letters in the answer."""

    def problems(self, split: str) -> Sequence[Problem]:
        """See Environment."""
        return Made(100_000, lambda number: Problem(letters(f"{split}/{number}"), {}))

    def reward(self, problem: Problem, answer: str) -> float:
        """See Environment."""
        return share_of_letters(answer)


def letters(seed: str) -> str:
    """Random letters."""
    return "".join(random.Random(seed).choices(string.ascii_letters, k=PROMPT))


def share_of_letters(answer: str) -> float:
    """The share of the characters that are letters of ASCII; 0 where there are none."""
    return sum(character in string.ascii_letters for character in answer) / max(len(answer), 1)
