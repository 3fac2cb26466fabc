"""Texts and conversations, of which each token is predicted: pretraining, and supervised tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpt_jax import hosts
from gpt_jax.config import Config
from gpt_jax.data.folders import DataFolders
from gpt_jax.data.loader import Prefetch
from gpt_jax.data.shards import Dataset
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import data_facts
from gpt_jax.sample.generate import encode_prompt, generate_tokens
from gpt_jax.sample.settings import Settings
from gpt_jax.train.evaluate import make_evaluate
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.step import TrainState
from gpt_jax.train.tasks.task import Feed

CONVERSATIONS_IN_A_SAMPLE = 3


class TextTask:
    """See Task."""

    objective = staticmethod(next_token)
    unit, steps_a_batch = "sequences", 1

    def __init__(self, config: Config, data: DataFolders, model: GPT, placement: Placement) -> None:
        self.config, self.data, self.model, self.placement = config, data, model, placement
        T, size, seed = config.model.context_length, config.data.batch_size, config.train.seed
        self.n_micro = placement.microbatches(size, config.data.microbatch_size)
        hosts.on_first(lambda: data.batches(T, seed))  # Packs documents once, for all hosts.
        self.batches = data.batches(T, seed)
        self.tokens_per_step = size * T
        self.facts = data_facts(*data.metas)
        self._evaluate = make_evaluate(model, placement, data, config)
        encode_prompt(config.train.sample_prompt, data.tokenizer, T)  # Raises now, not later.

    def describe(self) -> dict[str, str]:
        """See Task."""
        return {"data": f"\n{'':9}".join(self.data.describe(self.config.model.context_length))}

    def begin(self, state: TrainState, meta: dict[str, Any]) -> None:
        """See Task."""

    @contextmanager
    def feed(self, steps: range) -> Iterator[Feed]:
        """See Task."""
        rows = self.placement.rows(self.config.data.batch_size, self.n_micro)  # Those that this host loads.
        with Prefetch(lambda step: self.placement.split(self.batches(step, rows), self.n_micro), steps) as prefetched:
            batches = iter(prefetched)
            yield lambda step, state: (next(batches), {})

    def epochs(self, step: int) -> dict[str, float]:
        """See Task."""
        return self.batches.epochs(step)

    def evaluate(self, params: Params, step: int) -> dict[str, float]:
        """See Task."""
        return self._evaluate(params)

    def sample(self, params: Params, step: int) -> str:
        """See Task. Of texts, the continuation of the configured prompt; of conversations, answers to held-out ones,
        unless there is a prompt. The first replica of the parameters writes, on all hosts that take part in that."""
        first = self.placement.replicas(params).get(0)
        if first is None:
            return ""
        c, tokenizer = self.config.train, self.data.tokenizer
        settings = Settings(max_new_tokens=c.sample_tokens, seed=c.seed)
        chats = [] if c.sample_prompt else [d for d in self.data.by_name.values() if d.train.masked]
        if chats:
            T = self.config.model.context_length
            prompts = held_out_prompts(chats[0], CONVERSATIONS_IN_A_SAMPLE, T - min(c.sample_tokens, T // 2))
        else:
            prompts = [encode_prompt(c.sample_prompt, tokenizer, self.config.model.context_length)]
        results = generate_tokens(self.model, first, tokenizer, prompts, settings)
        if not hosts.is_first():
            return ""
        begins = [tokenizer.decode(prompt) for prompt in prompts] if chats else [c.sample_prompt]
        texts = [f"{begin}{result.text}" for begin, result in zip(begins, results, strict=True)]
        return "--- sample\n" + "\n---\n".join(texts) + "\n---"


def held_out_prompts(data: Dataset, n: int, max_tokens: int) -> list[list[int]]:
    """The tokens before the first answer of at most n conversations in the validation split, taken evenly from those
    with at most so many of them."""
    split = data.val
    starts = [*split.document_starts.tolist(), len(split)]
    found: list[list[int]] = []
    for i in np.linspace(0, len(starts) - 2, min(4 * n, len(starts) - 1)).astype(int).tolist():
        size = starts[i + 1] - starts[i]
        learnt = split.read_learnt(starts[i], size)
        n_prompt = int(learnt.argmax())
        if 0 < n_prompt <= max_tokens and len(found) < n:
            found.append(split.read(starts[i], n_prompt).tolist())
    return found
