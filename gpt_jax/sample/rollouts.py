"""Answers to problems, under parameters that may change from call to call: for rewards, and for evaluation."""

from collections.abc import Iterator, Sequence

import numpy as np

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
    """What writes answers where the parameters lie.

    An answer depends on the parameters, its prompt, the settings, and its seed, which is made of the run's seed, a
    number of the call, and its own number in it; not on the slots, nor on what else is written at that time.
    """

    def __init__(
        self,
        model: GPT,
        placement: Placement,
        tokenizer: Tokenizer,
        seed: int,
        n_answers: int,
        most_slots: int,
        most_tokens: int = 0,
    ) -> None:
        """n_answers: those of a call, as a rule. most_slots: those that each replica of the parameters writes at one
        time. most_tokens: those of a prompt and its answer in any call; 0: as many as the first call needs."""
        self.model, self.placement, self.tokenizer, self.seed = model, placement, tokenizer, seed
        self.n_answers, self.most_slots, self.most_tokens = n_answers, most_slots, most_tokens
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
                self.most_slots,
                n_tokens=self.tokenizer.vocab_size,
                chunks_a_turn=ALL_CHUNKS,
            )
            longest = max(map(len, prompts), default=1) + settings.max_new_tokens
            places = max(self.most_tokens, longest) - 1  # The last token is never read.
            self.engine.reserve(min(places, self.model.config.context_length))
        else:
            replace_params(self.engine, self.placement, params)

        def row(number: int) -> Row:
            row = Row(prompts[number // n], self.tokenizer, settings)
            row.seed = self.seed, call, number
            return row

        for number, written in write(self.engine, map(row, range(len(prompts) * n))):
            yield *divmod(number, n), written

    def prompt_tokens(self, problem: Problem) -> list[int]:
        """The tokens of a problem, up to where its answer begins. Raises UserError for a conversation that the template
        does not take."""
        if isinstance(problem.prompt, np.ndarray):
            return list(problem.prompt.tolist())
        if isinstance(problem.prompt, str):
            begin = [] if self.tokenizer.begin_of_text is None else [self.tokenizer.begin_of_text]
            return [*begin, *self.tokenizer.encode(problem.prompt)] or [self.tokenizer.end_of_text]
        return self.tokenizer.encode_chat(problem.prompt)
