"""`gpt-jax examples`: problems of an environment with their right answers, to tune a model on before it is rewarded."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.cli.parse import parse
from gpt_jax.config import check
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Problem, Problems, open_environment
from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing
from gpt_jax.system import command_line


@dataclass(frozen=True)
class ExamplesArgs:
    """Write problems of an environment with their right answers, as JSON Lines that prepare takes: conversations, or
    texts where the problems are texts."""

    environment: str = ""  # arithmetic, reasoning-gym:TASK, MODULE:NAME, FILE.py:NAME; docs/post-training.md.
    options: tuple[str, ...] = ()  # Its options, NAME=VALUE.
    out: str = ""  # File to write.
    split: SplitName = "train"  # Problems to learn from (train), or held out (val).
    n: int = 10_000  # The first problems of the split, at most.
    field: str = "answer"  # Field of a problem with the right answer.
    template: str = "{answer}"  # What is answered, such as "<answer>{answer}</answer>".
    wrong: float = 0.0  # Share that has the answer of any problem, as a text with mistakes may; few are right.

    def __post_init__(self) -> None:
        check(self.n >= 1, "n", self.n, "1 or more")
        check(0 <= self.wrong <= 1, "wrong", self.wrong, "between 0 and 1")
        check("{answer}" in self.template, "template", self.template, "a text with {answer} in it")
        for name in ("environment", "out"):
            check(getattr(self, name) != "", name, "", "given")


def command(argv: Sequence[str]) -> int:
    """Writes the examples, whole or not at all."""
    args = parse(ExamplesArgs, argv, "examples")
    problems = Problems(open_environment(args.environment, args.options), args.environment)
    n = min(args.n, problems.count(args.split))
    rng = np.random.default_rng(0)
    of_another = np.where(rng.random(n) < args.wrong, rng.integers(0, n, n), np.arange(n)).tolist()
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}")
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as f:
        for i in range(n):
            problem, text = problems.ask(args.split, of_another[i], functools.partial(answer, args))
            if of_another[i] != i:
                problem, _ = problems.ask(args.split, i, lambda problem: None)
            f.write(json.dumps(example(problem, text), ensure_ascii=False) + "\n")
    print(f"{n:,} examples in {out}; next: {command_line('prepare', out, '--out', 'DIR')}")
    return 0


def answer(args: ExamplesArgs, problem: Problem) -> str:
    """What is answered to a problem. Raises UserError when it does not say."""
    found = problem.fields.get(args.field)
    if found is None:
        fields = ", ".join(problem.fields) or "none"
        raise UserError(f"there is no {args.field}, only {fields}: name one by --field")
    return args.template.replace("{answer}", str(found))


def example(problem: Problem, answer: str) -> dict[str, Any]:
    """A problem with an answer. Raises UserError when it is not given as a text or a conversation."""
    if isinstance(problem.prompt, str):
        return {"text": problem.prompt + answer}
    if isinstance(problem.prompt, np.ndarray):
        raise UserError("it is of tokens; prepare the texts that they were made of")
    return {"messages": [*problem.prompt, {"role": "assistant", "content": answer}]}
