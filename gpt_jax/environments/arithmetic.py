"""Arithmetic, made by a seed: the least environment in which a model from nothing learns by rewards."""

import functools
import hashlib
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_jax.config import check, check_types
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Made, Problem

HELD_OUT = 10
"""One in so many expressions is held out: no problem of one split is one of the other."""


@dataclass(frozen=True)
class Arithmetic:
    """Sums, differences and products of whole numbers. The answer is the number alone, on one line; in a conversation,
    the last number that it has."""

    operations: str = "+-"  # Any of +, - and *.
    digits: int = 2  # Of a number, at most.
    terms: int = 2  # Numbers in a problem.
    chat: bool = False  # Conversations, "What is 17+25?", or else a text to be continued, "17+25=".
    n_train: int = 100_000  # Problems to learn from; few may be the same.
    n_val: int = 1_000  # Problems that are held out.
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "")
        known = bool(self.operations) and set(self.operations) <= set("+-*")
        check(known, "operations", self.operations, "some of + - *")
        for name, least, most in (("digits", 1, 9), ("terms", 2, 9), ("n_train", 1, 2**31), ("n_val", 1, 2**31)):
            value = getattr(self, name)
            check(least <= value <= most, name, value, f"from {least} to {most}")

    def problems(self, split: SplitName) -> Made:
        """See Environment."""
        return Made(self.n_train if split == "train" else self.n_val, functools.partial(self.problem, split))

    def problem(self, split: SplitName, index: int) -> Problem:
        """A problem, a function of the seed, the split and its number."""
        generator = random.Random(f"{self.seed} {split} {index}")
        while True:
            parts = [str(generator.randrange(10**self.digits))]
            for _ in range(self.terms - 1):
                parts += [generator.choice(self.operations), str(generator.randrange(10**self.digits))]
            text = "".join(parts)
            if is_held_out(text) == (split == "val"):
                prompt = [{"role": "user", "content": f"What is {text}?"}] if self.chat else f"{text}="
                return Problem(prompt, {"answer": value_of(parts)})

    def reward(self, problem: Problem, answer: str) -> float:
        """See Environment: 1 for the right number, else 0."""
        wanted = str(problem.fields["answer"])
        if self.chat:
            numbers = re.findall(r"-?\d+", answer)
            return float(bool(numbers) and numbers[-1] == wanted)
        return float(answer.strip("\n").partition("\n")[0].strip() == wanted)


def is_held_out(expression: str) -> bool:
    """True for expressions of the validation split, whatever the seed."""
    return hashlib.sha256(expression.encode()).digest()[0] % HELD_OUT == 0


def value_of(parts: Sequence[str]) -> int:
    """The value of numbers with operations between them, products first."""
    total = 0
    groups = itertools.groupby(parts, key=lambda part: part in "+-")
    sign = 1
    for is_sign, group in groups:
        members = list(group)
        if is_sign:
            sign = 1 if members == ["+"] else -1
        else:
            total += sign * math.prod(int(part) for part in members if part != "*")
    return total
