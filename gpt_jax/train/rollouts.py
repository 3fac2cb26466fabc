"""Answers that the model in training writes to problems, by the engine that samples, where the parameters lie."""

from collections.abc import Iterator, Sequence

import numpy as np

from gpt_jax.config import GrpoConfig
from gpt_jax.environments.environment import Problem
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.sample.engine import ALL_CHUNKS, Engine
from gpt_jax.sample.generate import Row, write
from gpt_jax.sample.replicas import Replicas, engine_on, replace_params
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer

EVALUATION = 2**31
"""Added to the step in the seeds of answers to held-out problems, since no training takes so many steps."""


class Rollouts:
    """What writes answers under parameters that change from call to call.

    An answer depends on the parameters, its prompt, the settings, and its seed, which is made of the run's seed, a
    number of the call, and its own number in it; not on the slots, nor on what else is written at that time.
    """

    def __init__(
        self, model: GPT, placement: Placement, tokenizer: Tokenizer, config: GrpoConfig, seed: int, n_answers: int
    ) -> None:
        """n_answers: those of a step."""
        self.model, self.placement, self.tokenizer, self.config = model, placement, tokenizer, config
        self.seed, self.n_answers = seed, n_answers
        self.engine: Engine | Replicas | None = None

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], n: int, settings: Settings, call: int
    ) -> Iterator[tuple[int, int, Row]]:
        """Writes n answers to each prompt. Yields the number of a prompt and of its answer, and the answer, as soon as
        it is there."""
        if self.engine is None:
            self.engine = engine_on(
                self.placement,
                self.model,
                params,
                self.n_answers,
                self.config.slots,
                n_tokens=self.tokenizer.vocab_size,
                chunks_a_turn=ALL_CHUNKS,
            )
            most = self.config.max_prompt_tokens + self.config.max_new_tokens
            self.engine.reserve(min(most, self.model.config.context_length))
        else:
            replace_params(self.engine, self.placement, params)

        def row(number: int) -> Row:
            row = Row(prompts[number // n], self.tokenizer, settings)
            row.seed = self.seed, call, number
            return row

        for number, written in write(self.engine, map(row, range(len(prompts) * n))):
            yield *divmod(number, n), written


def prompt_tokens(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a problem, up to where its answer begins. Raises UserError for a conversation that the template
    does not take."""
    if isinstance(problem.prompt, np.ndarray):
        return list(problem.prompt.tolist())
    if isinstance(problem.prompt, str):
        begin = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
        return [*begin, *tokenizer.encode(problem.prompt)] or [tokenizer.end_of_text]
    return tokenizer.encode_chat(problem.prompt)
