"""Sums, differences and products of random numbers, which a small model learns in minutes."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gpt_jax.config.check import check, check_types
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Made, Problem
from gpt_jax.environments.numbers import last_number

VAL_FRACTION = 0.1
"""Of all expressions; the others are for training. Not an option, so that no setting trains on what another tests."""


@dataclass(frozen=True)
class Arithmetic:
    """Problems such as "17+25=", to be answered by the number and a newline or the end; with `chat`, conversations, of
    whose answers the last number counts.

    Each problem is a function of the seed, the split and its number. No expression is in both splits, whatever the
    options; within a split, expressions recur where there are few. Raises UserError for impossible options.
    """

    operations: str = "+-"  # Some of + - *.
    digits: int = 2  # Of each term, at most.
    terms: int = 2
    n_train: int = 100_000
    n_val: int = 1_000
    seed: int = 0
    chat: bool = False  # Whether the problems are conversations.

    def __post_init__(self) -> None:
        check_types(self, "")
        distinct = len(set(self.operations)) == len(self.operations) > 0
        check(distinct and set(self.operations) <= {*"+-*"}, "operations", self.operations, "some of + - *, each once")
        check(1 <= self.digits <= 9, "digits", self.digits, "1 to 9")
        check(2 <= self.terms <= 9, "terms", self.terms, "2 to 9")
        for name in ("n_train", "n_val"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def problems(self, split: SplitName) -> Sequence[Problem]:
        """See Environment."""
        return Made(self.n_train if split == "train" else self.n_val, partial(self._problem, split))

    def reward(self, problem: Problem, answer: str) -> float:
        """1.0 for the right number, else 0.0."""
        right = problem.fields["answer"]
        if self.chat:
            return float(last_number(answer) == right)
        return float(answer.partition("\n")[0].strip() == str(right))

    def _problem(self, split: SplitName, number: int) -> Problem:
        expressions = (self._expression(f"{self.seed}/{split}/{number}/{attempt}") for attempt in itertools.count())
        expression, answer = next(drawn for drawn in expressions if split_of(drawn[0]) == split)
        prompt = [{"role": "user", "content": f"What is {expression}?"}] if self.chat else f"{expression}="
        return Problem(prompt, {"expression": expression, "answer": answer})

    def _expression(self, key: str) -> tuple[str, int]:
        """A random expression, and its value. All of them are equally likely, up to one in 2**200: the hash of the key
        is a number of 512 bits, and no option needs more than 300."""
        rest = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "little")
        expression, total, product = "", 0, 0  # `product` is the last summand, which a factor may follow.
        for i in range(self.terms):
            rest, term = divmod(rest, 10**self.digits)
            operation = ""
            if i:
                rest, drawn = divmod(rest, len(self.operations))
                operation = self.operations[drawn]
            expression += f"{operation}{term}"
            if operation == "*":
                product *= term
            else:
                total, product = total + product, -term if operation == "-" else term
        return expression, total + product


def split_of(expression: str) -> SplitName:
    """The split that an expression belongs to, by its hash."""
    digest = hashlib.blake2b(expression.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < VAL_FRACTION * 2**64 else "train"
