"""How many problems of an environment a model solves: rewards, pass@1 with its interval, pass@k."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Problems
from gpt_jax.environments.judges import Judges
from gpt_jax.model.gpt import Params
from gpt_jax.sample.generate import Row
from gpt_jax.sample.rollouts import Rollouts
from gpt_jax.sample.settings import Settings

SOLVED = 1 - 1e-6
"""A reward of at least this is a right answer."""


@dataclass(frozen=True)
class Answered:
    """An answer and its reward."""

    number: int  # Of the problem.
    row: Row
    reward: float


def answer_problems(
    rollouts: Rollouts,
    params: Params,
    problems: Problems,
    judges: Judges,
    split: SplitName,
    numbers: Sequence[int],
    n_samples: int,
    settings: Settings,
    max_prompt_tokens: int,
    call: int,
) -> Iterator[list[Answered]]:
    """The answers to each of the problems of a split with these numbers, in order, as far as their prompts have at most
    so many tokens. call: what tells these answers from others of the same seed. Raises ProblemError."""
    asked = {number: problems.ask(split, number, rollouts.prompt_tokens) for number in numbers}
    fits = [number for number, (_, prompt) in asked.items() if len(prompt) <= max_prompt_tokens]
    found: dict[tuple[int, int], tuple[Row, Future[float]]] = {}
    for i, sample, row in rollouts(params, [asked[number][1] for number in fits], n_samples, settings, call):
        number = fits[i]
        found[number, sample] = row, judges.submit(split, number, row.result.text, asked[number][0])
    for number in fits:
        answers = [found[number, sample] for sample in range(n_samples)]
        yield [Answered(number, row, future.result()) for row, future in answers]


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The probability that k of n answers, of which n_right are right, have a right one (Chen et al. 2021)."""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def interval(rates: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of rates, one a problem: Wilson's where all are 0 or 1, or equal, else that of
    the normal distribution."""
    n, p, z = len(rates), float(np.mean(rates)), 1.96
    if len(set(rates)) == 1 or set(rates) <= {0.0, 1.0}:  # Equal rates have no deviation to tell from.
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    else:
        centre, half = p, z * float(np.std(rates, ddof=1)) / math.sqrt(n)
    return max(0.0, centre - half), min(1.0, centre + half)
