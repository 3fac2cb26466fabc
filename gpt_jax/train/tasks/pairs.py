"""Pairs of a chosen and a rejected answer, which are compared with what the model said to them before."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import Config
from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import Prefetch
from gpt_jax.data.preferences import PairFolder, PreferenceBatches, preference_eval_batches
from gpt_jax.data.shards import SplitName
from gpt_jax.errors import UserError
from gpt_jax.model.backend import least_length
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import data_facts
from gpt_jax.run.folder import run_folder
from gpt_jax.sample.generate import generate_tokens
from gpt_jax.sample.settings import Settings
from gpt_jax.train.evaluate import eval_batch_size
from gpt_jax.train.objectives.dpo import Reference, make_dpo
from gpt_jax.train.references import make_answer_logprobs, pair_logprobs, reference_model
from gpt_jax.train.step import TrainState, make_eval_step
from gpt_jax.train.tasks.task import Feed


class PairTask:
    """See Task."""

    unit, tokens_per_step, steps_a_batch = "pairs", 0, 1

    def __init__(self, config: Config, data: PairFolder, model: GPT, placement: Placement) -> None:
        self.config, self.data, self.model, self.placement = config, data, model, placement
        T, size = config.model.context_length, config.data.batch_size
        self.n_micro = placement.microbatches(size, config.data.microbatch_size)
        self.sizes = row_sizes(model, placement)
        self.batches = PreferenceBatches(data.rows("train", T), size, config.train.seed, self.sizes)
        self.facts = data_facts(*data.metas)
        self.objective = make_dpo(config.objective.dpo)
        self.eval_step = placement.jit(make_eval_step(self.objective, model, placement.axis_name), donate=False)
        self.eval_size = eval_batch_size(config, placement)
        if not len(data.rows("val", T)):
            raise UserError(
                f"no pair of the validation split of {data.data.folder} fits into model.context_length + 1 = {T + 1} "
                "tokens; use a longer context, or prepare it with more pairs"
            )

    def describe(self) -> dict[str, str]:
        """See Task."""
        return {"data": f"\n{'':9}".join(self.data.describe(self.config.model.context_length))}

    def begin(self, state: TrainState, meta: dict[str, Any]) -> None:
        """See Task. Here, the reference model says what it has to say to all pairs or, with `reference` model, to those
        of the validation split; then it says it to the others batch by batch."""
        keep = self.config.objective.dpo.reference == "model"

        @functools.cache
        def load() -> tuple[GPT, Callable[[TrainState], Params]]:
            return reference_model(self.config, self.model, self.placement, state, meta["base"], keep)

        def loaded() -> tuple[GPT, Params]:
            model, params = load()
            return model, params(state)

        def logprobs(split: SplitName) -> np.ndarray:
            fingerprint = f"{meta['base']} {self.data.metas[0].splits[split].fingerprint}"
            own = self.data.data.folder
            folder = own if isinstance(own, Path) else run_folder(self.config.out_dir).path
            rows = self.data.rows(split, self.config.model.context_length)
            return pair_logprobs(
                folder, split, fingerprint, rows, self.eval_size, self.sizes, self.placement, loaded, self.model
            )

        self.val_logprobs = logprobs("val")
        self.train_logprobs = None if keep else logprobs("train")
        if keep:
            model, self.reference_params = load()
            self.reference_step = self.placement.jit(make_answer_logprobs(model), donate=False, divided=True)

    @contextmanager
    def feed(self, steps: range) -> Iterator[Feed]:
        """See Task."""
        own = self.placement.rows(self.config.data.batch_size, self.n_micro)

        def make(step: int) -> Batch:
            batch = self.batches(step, own)
            if self.train_logprobs is not None:
                batch = batch._replace(extra=Reference(self.train_logprobs[self.batches.drawn(step, own)]))
            return self.placement.split(batch, self.n_micro)

        with Prefetch(make, steps) as prefetched:
            batches = iter(prefetched)

            def feed(step: int, state: TrainState) -> tuple[Batch, dict[str, float]]:
                batch = next(batches)
                if batch.extra is None:
                    said = self.reference_step(self.reference_params(state), batch)
                    if self.placement.must_wait:
                        jax.block_until_ready(said)
                    batch = batch._replace(extra=Reference(said))
                lengths = self.batches.rows.pairs.lengths[self.batches.rows.numbers[self.batches.drawn(step)]]
                return batch, {"step_tokens": int((lengths @ (2, 1, 1)).sum())}

            yield feed

    def epochs(self, step: int) -> dict[str, float]:
        """See Task."""
        return {"pairs": step * self.config.data.batch_size / len(self.batches.rows)}

    def evaluate(self, params: Params, step: int) -> dict[str, float]:
        """See Task: what the objective logs, of all pairs of the validation split."""
        rows, own = self.data.rows("val", self.config.model.context_length), self.placement.rows(self.eval_size)
        found = []
        for numbers, batch in preference_eval_batches(rows, self.eval_size, self.sizes):
            said = np.zeros((self.eval_size, 2), np.float32)
            said[: len(numbers)] = self.val_logprobs[numbers]
            batch = batch._replace(extra=Reference(said))
            found.append(self.eval_step(params, self.placement.split(jax.tree.map(lambda x: x[own], batch))))
            if self.placement.must_wait:
                jax.block_until_ready(found[-1])
        total = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *jax.device_get(found))
        logged = {f"val_{name}": value / count for name, (value, count) in total.logged.items()}
        return {"val_loss": total.numerator / total.denominator, **logged}

    def sample(self, params: Params, step: int) -> str:
        """See Task: an answer to the prompt of a held-out pair."""
        first = self.placement.replicas(params).get(0)
        if first is None:
            return ""
        c, tokenizer = self.config.train, self.data.tokenizer
        rows = self.data.rows("val", self.config.model.context_length)
        prompt = rows.pairs.pair(int(rows.numbers[0])).prompt.tolist()
        settings = Settings(max_new_tokens=c.sample_tokens, seed=c.seed)
        [result] = generate_tokens(self.model, first, tokenizer, [prompt], settings)
        return f"--- sample\n{tokenizer.decode(prompt)}{result.text}\n---"


def row_sizes(model: GPT, placement: Placement) -> tuple[int, ...]:
    """The lengths of rows for which programs are compiled: quarters of the context, as far as the attention and the
    devices that divide a sequence can have them."""
    T = model.config.context_length
    least = least_length(model.config) * placement.context
    return tuple(T * i // 4 for i in (1, 2, 3, 4) if i == 4 or (T % 4 == 0 and T * i // 4 % least == 0))
