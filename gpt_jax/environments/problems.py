"""A prepared problem set, whose answers are right if they are what its records say."""

import re

from gpt_jax.data.problems import ProblemFiles
from gpt_jax.data.shards import SPLITS, SplitName, open_dataset
from gpt_jax.environments.environment import Made, Problem
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import location

MARK = "####"
"""What stands before the result, in GSM8K's answers."""


class ExactMatch:
    """The problems in a folder that `prepare` made. An answer is right if it equals the field `field` of the problem's
    record, without the white space around both; with last_number, if the last numbers of both are equal."""

    def __init__(self, folder: str, field: str = "answer", last_number: bool = False) -> None:
        """Raises UserError when the folder has no problem set, or a problem lacks the field."""
        self.field, self.last_number = field, last_number
        if not folder:
            raise UserError("the environment problems needs a folder: name it by --data.dir")
        data = open_dataset(location(folder))
        self._files = {split: ProblemFiles(data, split) for split in SPLITS}
        for split, files in self._files.items():
            if len(files) and self.field not in (fields := files.problem(0).fields):
                raise UserError(
                    f"{folder}: problem 0 of {split} has no field {field!r} but {', '.join(fields) or 'none'}; name "
                    "the one with the answer by the option field=NAME"
                )

    def problems(self, split: SplitName) -> Made:
        """See Environment."""

        def problem(index: int) -> Problem:
            found = files.problem(index)
            return Problem(found.prompt, found.fields)

        files = self._files[split]
        return Made(len(files), problem)

    def reward(self, problem: Problem, answer: str) -> float:
        """See Environment: 1 for the right answer, else 0."""
        wanted = str(problem.fields[self.field]).rpartition(MARK)[2]
        if self.last_number:
            return float(last_number(answer) == last_number(wanted) is not None)
        return float(answer.strip() == wanted.strip())


def last_number(text: str) -> float | None:
    """The last number in a text, such as -1,234.5; None when there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
