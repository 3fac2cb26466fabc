"""The problem set that `prepare` made, where an answer is right if it is the one that a field of the problem has."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gpt_jax.config.check import check_types
from gpt_jax.data.problems import ProblemFiles
from gpt_jax.data.shards import SPLITS, SplitName, open_dataset
from gpt_jax.environments import numbers
from gpt_jax.environments.environment import Made, Problem
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import location


@dataclass(frozen=True)
class ExactMatch:
    """The problems of a data folder, with prompts of tokens.

    Raises UserError when the folder is no problem set, and naming the first problem without an answer to compare with:
    all of them are read, a million in a few seconds.
    """

    data: str
    field: str = "answer"  # That has the right answer, a text or a number.
    # Whether only the last numbers are compared, by value. Of a text with ####, only what follows the last one counts,
    # as in GSM8K, whose answers end with "#### 42".
    last_number: bool = False

    def __post_init__(self) -> None:
        check_types(self, "")
        if not self.data:
            raise UserError("it needs the data folder of a problem set; make one with prepare --format problem")
        for split in SPLITS:
            for number, fields in enumerate(self._files[split].fields()):
                try:
                    self._right(fields)
                except UserError as e:
                    raise UserError(f"{self.data}: problem {number} of {split} {e}") from e

    @functools.cached_property
    def _files(self) -> dict[SplitName, ProblemFiles]:
        dataset = open_dataset(location(self.data))
        return {split: ProblemFiles(dataset, split) for split in SPLITS}

    def problems(self, split: SplitName) -> Sequence[Problem]:
        """See Environment."""
        files = self._files[split]

        def problem(number: int) -> Problem:
            _, prompt, fields = files.problem(number)
            return Problem(prompt, fields)

        return Made(len(files), problem)

    def reward(self, problem: Problem, answer: str) -> float:
        """1.0 for the right answer, else 0.0. White space around it does not count."""
        return float(self._compared(answer) == self._right(problem.fields))

    def _right(self, fields: Mapping[str, Any]) -> str | Decimal:
        """What answers are compared with. Raises UserError when there is no such thing."""
        if self.field not in fields:
            others = f"it has {', '.join(fields) or 'none'}"
            raise UserError(f"has no field {self.field!r}; {others}: name one with the option field")
        value = fields[self.field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"has a field {self.field!r} of type {type(value).__name__}, which is no text or number")
        right = self._compared(str(value))
        if not right and right != 0:
            raise UserError(f"has no {'number' if self.last_number else 'text'} in its field {self.field!r}")
        return right

    def _compared(self, answer: str) -> str | Decimal | None:
        """What of an answer is compared."""
        return numbers.last_number(answer.rpartition("####")[2]) if self.last_number else answer.strip()
