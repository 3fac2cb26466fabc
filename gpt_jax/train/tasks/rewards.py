"""Problems, the answers that the model in training writes to them, and the rewards of these."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gpt_jax import hosts
from gpt_jax.config import Config, GrpoConfig
from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import draw, samples_of
from gpt_jax.data.shards import SPLITS, Meta
from gpt_jax.environments.environment import ProblemError, Problems
from gpt_jax.environments.judges import Judges
from gpt_jax.errors import UserError
from gpt_jax.evaluate.solve import Answered, answer_problems
from gpt_jax.model.backend import least_length
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import data_facts
from gpt_jax.sample.decode import bucket
from gpt_jax.sample.generate import Row
from gpt_jax.sample.rollouts import EVALUATION, Rollouts
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.system import available_cores
from gpt_jax.tokenizer.tokenizer import Tokenizer
from gpt_jax.train.logprobs import make_logprobs_step
from gpt_jax.train.objectives.grpo import NO_SPREAD, Rewarded, advantages, as_drawn, filters, make_grpo
from gpt_jax.train.references import reference_model
from gpt_jax.train.step import TrainState
from gpt_jax.train.tasks.task import Feed

STEPS_TO_WARN = 10
"""Steps with equal rewards, from the start of a run, after which it says so."""


@dataclass(frozen=True)
class RewardSource:
    """The environment of a run, and the tokenizer of the model that is tuned."""

    config: GrpoConfig
    problems: Problems
    tokenizer: Tokenizer
    metas: list[Meta]  # Of the prepared problem set, if it is one.
    folder: str = ""  # That set.


class RewardTask:
    """See Task. Each batch has `group_size` answers to each of `data.batch_size` problems."""

    unit, tokens_per_step = "problems", 0

    def __init__(self, config: Config, source: RewardSource, model: GPT, placement: Placement) -> None:
        if hosts.several():
            raise UserError("objective.name = grpo runs on one host; leave out --coordinator")
        self.config, self.source, self.model, self.placement = config, source, model, placement
        self.grpo = grpo = config.objective.grpo
        self.size, self.steps_a_batch = config.data.batch_size, grpo.iterations
        self.n_micro = placement.microbatches(self.size, config.data.microbatch_size)
        self.sizes = batch_sizes(self.size, placement.n_shares, self.n_micro)
        most, T = grpo.max_prompt_tokens + grpo.max_new_tokens, model.config.context_length
        if most > T + 1:
            raise UserError(
                f"objective.grpo.max_prompt_tokens + max_new_tokens = {most} are more than model.context_length + 1 = "
                f"{T + 1}; shorten the answers, or leave out longer problems"
            )
        n_tokens = source.tokenizer.vocab_size
        self.objective = make_grpo(grpo, n_tokens)
        n_answers, seed = self.size * grpo.group_size, config.train.seed
        self.rollouts = Rollouts(model, placement, source.tokenizer, seed, n_answers, grpo.slots, most)
        self.settings = Settings(max_new_tokens=grpo.max_new_tokens, stop=grpo.stop, filters=filters(grpo))
        self.logprobs_step = placement.jit(make_logprobs_step(model, n_tokens, as_drawn(grpo)), False, divided=True)
        self.n_train, self.n_val = (source.problems.count(split) for split in SPLITS)
        for split in SPLITS:
            source.problems.ask(split, 0, self.rollouts.prompt_tokens)  # Raises now, not later.
        self.n_evaluated = min(grpo.eval_problems, self.n_val)
        own = {
            "tokenizer": source.tokenizer.fingerprint,
            "data": " ".join((grpo.environment, *grpo.options)),
            "splits": {},
        }
        self.facts = data_facts(*source.metas) if source.metas else own
        self.reference_params: Callable[[TrainState], Params] | None = None
        self.equal_steps: int | None = 0  # None: some rewards were different.
        self.first_reward = 0.0

    def describe(self) -> dict[str, str]:
        """See Task."""
        g, name = self.grpo, " ".join((self.grpo.environment, *self.grpo.options))
        return {
            "data": f"{name}: {self.n_train:,} training and {self.n_val:,} held-out problems",
            "rewards": f"{g.loss}, {self.size} x {g.group_size} answers of up to {g.max_new_tokens} tokens a step",
        }

    def begin(self, state: TrainState, meta: dict[str, Any]) -> None:
        """See Task."""
        if self.grpo.kl_beta:
            run = self.config, self.model, self.placement, state
            model, self.reference_params = reference_model(*run, meta["base"], keep=True)
            step = make_logprobs_step(model, self.source.tokenizer.vocab_size, as_drawn(self.grpo))
            self.reference_step = self.placement.jit(step, False, divided=True)

    @contextmanager
    def feed(self, steps: range) -> Iterator[Feed]:
        """See Task."""
        g = self.grpo
        self.equal_steps = 0 if steps.start == 0 else None
        n_judges = g.judges or max(1, available_cores() - 1)
        batch: Batch | None = None
        facts: dict[str, float] = {}

        def feed(step: int, state: TrainState) -> tuple[Batch, dict[str, float]]:
            nonlocal batch, facts
            if batch is None or step % g.iterations == 0:
                batch, facts = self.collect(step, state)
                return batch, facts
            return batch, {**facts, "step_tokens": 0, "rollout_ms": 0.0, "judging_ms": 0.0}

        with Judges(g.environment, g.options, self.source.folder, n_judges, g.judge_timeout) as judges:
            self.judges = judges
            yield feed

    def drawn(self, step: int) -> list[int]:
        """The numbers of a step's problems."""
        samples = samples_of(step // self.grpo.iterations, self.size, None)
        return [number for number, _ in draw(self.n_train, samples, self.config.train.seed)]

    def collect(self, step: int, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """The answers of a step with their rewards, on the devices, and what is to be logged of them."""
        g, begin = self.grpo, time.perf_counter()
        P, G = self.size, g.group_size
        numbers, ask, read = self.drawn(step), self.source.problems.ask, self.rollouts.prompt_tokens
        problems, prompts = zip(*(ask("train", number, read) for number in numbers), strict=True)
        fits = [place for place, prompt in enumerate(prompts) if len(prompt) <= g.max_prompt_tokens]
        if not fits:
            raise ProblemError(
                f"problem {numbers[0]} of train has a prompt of {len(prompts[0])} tokens, and no problem of this step "
                f"has one of objective.grpo.max_prompt_tokens = {g.max_prompt_tokens} or less; raise it"
            )
        rows, futures = {}, {}
        for i, sample, row in self.rollouts(state.all_params(), [prompts[i] for i in fits], G, self.settings, step):
            place = fits[i]
            rows[place, sample] = row
            # While others are written, other processes judge this one.
            futures[place, sample] = self.judges.submit("train", numbers[place], row.result.text, problems[place])
        written = time.perf_counter()
        rewards_PG = np.zeros((P, G))
        for where, future in futures.items():
            rewards_PG[where] = future.result()
        waited = time.perf_counter()

        lengths_PG, is_cut_PG = np.zeros((P, G), int), np.zeros((P, G), bool)
        for where, row in rows.items():
            lengths_PG[where], is_cut_PG[where] = len(row.result.tokens), row.result.finish_reason == "length"
        advantages_PG, has_spread_P = np.zeros((P, G), np.float32), np.zeros(P, bool)
        advantages_PG[fits], has_spread_P[fits] = advantages(rewards_PG[fits], g)
        counts_PG = has_spread_P[:, None] & ~(is_cut_PG & (g.overlong == "mask"))
        self.notice_equal_rewards(rewards_PG[fits])

        # Groups that do not count are not computed, except for those that fill up the batch.
        counts_P = counts_PG.any(axis=1)
        places = np.argsort(~counts_P, kind="stable")[: next(n for n in self.sizes if n >= counts_P.sum())]
        batch = self.batch([[rows.get((place, sample)) for sample in range(G)] for place in places.tolist()])
        batch = batch._replace(extra=Rewarded(advantages_PG[places], counts_PG[places], batch.extra))
        return self.on_devices(batch, state), {
            "reward": float(rewards_PG[fits].mean()),
            "step_tokens": int(lengths_PG.sum()),
            "answer_tokens": float(lengths_PG[fits].mean()),
            "overlong": int(is_cut_PG.sum()),
            "without_spread": int((~has_spread_P[fits]).sum()),
            "too_long": P - len(fits),
            "rollout_ms": (written - begin) * 1e3,
            "judging_ms": (waited - written) * 1e3,
        }

    def batch(self, rows_PG: Sequence[Sequence[Row | None]]) -> Batch:
        """A batch (P, G, T) of answers, with the tokens that were drawn as its mask and their log-probabilities,
        float32 (P, G, T), as `extra`. T is a power of two times what suits the attention, or what the longest answer
        that may be needs."""
        results = {(i, k): row.result for i, group in enumerate(rows_PG) for k, row in enumerate(group) if row}
        longest = max((len(result.prompt_tokens) + len(result.tokens) for result in results.values()), default=2)
        least = least_length(self.model.config) * self.placement.context
        most = -(-(self.grpo.max_prompt_tokens + self.grpo.max_new_tokens - 1) // least)
        T = min(least * bucket(-(-(longest - 1) // least), most, 1), self.model.config.context_length)
        P, G = len(rows_PG), self.grpo.group_size
        tokens_PGT, drawn_PGT = np.zeros((P, G, T + 1), np.int32), np.zeros((P, G, T), np.float32)
        mask_PGT = np.zeros((P, G, T), bool)
        for where, result in results.items():
            prompt, answer = result.prompt_tokens, result.tokens
            targets = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)  # Target t is token t + 1.
            tokens_PGT[where][: targets.stop + 1] = prompt + answer
            mask_PGT[where][targets] = True
            drawn_PGT[where][targets] = result.drawn_logprobs
        return Batch(tokens_PGT, mask_PGT, extra=drawn_PGT)

    def on_devices(self, batch: Batch, state: TrainState) -> Batch:
        """The batch on the devices, with the log-probabilities that are needed of other parameters than those of each
        step: the reference's and, where several steps take the same answers, those that drew them."""
        batch = self.placement.split(batch, self.sizes[len(batch.tokens)])
        bare, rewarded = batch._replace(extra=None), batch.extra
        if self.reference_params is not None:
            said = self.logprobs(self.reference_step, self.reference_params(state), bare)
            rewarded = rewarded._replace(reference=said)
        if self.grpo.iterations > 1:
            rewarded = rewarded._replace(old=self.logprobs(self.logprobs_step, state.all_params(), bare))
        return batch._replace(extra=rewarded)

    def logprobs(self, step: Any, params: Params, batch: Batch) -> jax.Array:
        """The log-probabilities of drawn tokens. Several CPU devices can deadlock when programs with sums queue up."""
        found = step(params, batch)
        return jax.block_until_ready(found) if self.placement.must_wait else found

    def notice_equal_rewards(self, rewards: np.ndarray) -> None:
        """Says that nothing can be learnt when all rewards of a run's first steps are the same."""
        if self.equal_steps is None:
            return
        self.first_reward = rewards.flat[0] if self.equal_steps == 0 else self.first_reward
        self.equal_steps = self.equal_steps + 1 if np.all(np.abs(rewards - self.first_reward) <= NO_SPREAD) else None
        if self.equal_steps == STEPS_TO_WARN:
            print(
                f"all rewards of the first {STEPS_TO_WARN} steps are {self.first_reward:g}, from which nothing is "
                "learnt: make the problems easier or harder, or tune the model on answers to them first",
                file=sys.stderr,
            )

    def epochs(self, step: int) -> dict[str, float]:
        """See Task."""
        return {"problems": -(-step // self.grpo.iterations) * self.size / self.n_train}

    def evaluate(self, params: Params, step: int) -> dict[str, float]:
        """See Task: the mean reward of one answer to each of the first held-out problems. The loss is what it lacks
        to 1."""
        answered = list(self.answer_held_out(params, range(self.n_evaluated), step))
        if not answered:
            raise ProblemError(
                f"no held-out problem has a prompt of objective.grpo.max_prompt_tokens = {self.grpo.max_prompt_tokens} "
                "tokens or less; raise it"
            )
        reward = float(np.mean([one.reward for one in answered]))
        length = float(np.mean([len(one.row.result.tokens) for one in answered]))
        return {"val_loss": 1 - reward, "val_reward": reward, "val_answer_tokens": length}

    def answer_held_out(self, params: Params, numbers: range, step: int) -> Iterator[Answered]:
        """Answers to those of the held-out problems whose prompts are short enough, in order."""
        settings = dataclasses.replace(self.settings, filters=Filters(self.grpo.eval_temperature, top_p=1.0))
        problems, most = self.source.problems, self.grpo.max_prompt_tokens
        asked = answer_problems(
            self.rollouts, params, problems, self.judges, "val", numbers, 1, settings, most, EVALUATION + step
        )
        yield from (answered for [answered] in asked)

    def sample(self, params: Params, step: int) -> str:
        """See Task: a held-out problem, another one each time, with an answer and its reward."""
        number = step // max(1, self.config.train.sample_every) % self.n_evaluated
        decode = self.source.tokenizer.decode
        texts = [
            f"{decode(one.row.result.prompt_tokens)}{one.row.result.text}\n--- reward {one.reward:g}"
            for one in self.answer_held_out(params, range(number, number + 1), step)
        ]
        return "--- sample\n" + "\n".join(texts)


def batch_sizes(batch_size: int, n_shares: int, n_micro: int) -> dict[int, int]:
    """Numbers of groups, rising, that a step may have so that there are programs for few: a quarter, half of them, all.
    With each, the microbatches of a share, which are no larger than those of the whole batch."""
    rows = batch_size // n_shares // n_micro
    sizes = [n for n in (batch_size // 4, batch_size // 2, batch_size) if n and n % n_shares == 0]
    counts = {n: -(-n // n_shares // rows) for n in sizes}
    return {n: count for n, count in counts.items() if n // n_shares % count == 0}
