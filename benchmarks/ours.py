"""gpt_jax as a contestant: the one module of the benchmarks that runs it by its parts.

What learning does not need is imported where it is used: the time of imports is a part of what is measured there.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks import contestants
from benchmarks.contestants import Arrays, Asked, Conversations, Tuned, prompts
from benchmarks.measure import memory_of_libraries, peak_memory
from benchmarks.presets import Preset
from gpt_jax import runtime
from gpt_jax.config import Config, DataConfig, ModelConfig, ParallelConfig
from gpt_jax.data.batch import Batch
from gpt_jax.model.backend import resolve_for
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import TrainState, init_state, make_eval_step, make_train_step

if TYPE_CHECKING:
    from gpt_jax.sample.engine import Engine, Request


class Training(contestants.Training):
    """Trains a preset, placed as `train.py` would place it unless the arguments ask for something else."""

    def __init__(self, preset: Preset, parallel: ParallelConfig | None = None) -> None:
        self.preset, self.parallel, model = preset, parallel or ParallelConfig(), preset.model
        config = Config(model=model, data=DataConfig(batch_size=preset.batch_size), parallel=self.parallel)
        runtime.setup(runtime.choose_cpu_devices(config))
        self.placement = choose_placement(self.parallel, model, runtime.choose_devices(config.parallel))
        self.device = self.placement.devices[0]
        self.model = GPT(resolve_for(model, self.device, self.placement.context))
        self.libraries = memory_of_libraries(self.device.platform == "cpu")
        self.optimizer = make_optimizer(preset.optimizer, preset.schedule_steps)
        self.train_step = self.build(self.optimizer)
        eval_step = make_eval_step(next_token, self.model, self.placement.axis_name)
        self.eval_step = self.placement.jit(eval_step, donate=False)

    def build(self, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
        """The jitted train step with an optimizer."""
        schedule = learning_rate_schedule(self.preset.optimizer, self.preset.schedule_steps)
        step = make_train_step(next_token, self.model, optimizer, schedule, 0, self.placement.axis_name)
        return self.placement.jit(step, donate=True)

    @functools.cached_property
    def state(self) -> TrainState:
        """That of a run with seed 0, until there is another."""
        state: TrainState = self.placement.make(lambda: init_state(self.model, self.optimizer, 0))
        return state

    def initial(self) -> Arrays:
        """The parameters to start from: those of `state`."""
        return arrays_of(self.state.params)

    def state_from(self, parameters: Arrays, optimizer: optax.GradientTransformation) -> TrainState:
        """The initial state of an optimizer, with other parameters."""
        initial = traverse_util.unflatten_dict(parameters, sep="/")
        params = jax.device_put(initial, self.placement.state_shardings(initial))
        return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), {})

    def start(self, parameters: Arrays) -> None:
        self.state = self.state_from(parameters, self.optimizer)

    def how(self) -> dict[str, Any]:
        """What "auto" came to."""
        of_model = {name: getattr(self.model.config, name) for name in ("attention", "unroll", "dtype", "loss_chunk")}
        return {"devices": self.placement.n_devices, "mesh": self.parallel.uses_mesh, **of_model}

    def gradients(self, parameters: Arrays, tokens: Batch) -> Arrays:
        optimizer = optax.trace(decay=0.0)  # Its state is the last gradients.
        state, _ = self.build(optimizer)(self.state_from(parameters, optimizer), tokens)
        return arrays_of(state.opt_state.trace)

    def put(self, tokens: np.ndarray) -> Batch:
        batch: Batch = self.placement.split(Batch(tokens), 1)
        return batch

    def train(self, tokens: Batch) -> Any:
        self.state, metrics = self.train_step(self.state, tokens)
        if self.placement.must_wait:
            self.wait()
        return metrics.loss

    def wait(self) -> None:
        jax.block_until_ready(self.state)

    def mean_loss(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        sums = []
        for tokens, mask_BT in batches:
            sums.append(self.eval_step(self.state.params, self.placement.split(Batch(tokens, mask_BT)))[:2])
            if self.placement.must_wait:
                jax.block_until_ready(sums[-1])
        loss, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(loss / count)

    def call_ms(self, count: int) -> float:
        """Milliseconds until the call of a step returns: the median of so many, each of which is then waited for."""
        tokens, seconds = self.numbered(0), []
        for _ in range(count):
            begin = time.perf_counter()
            self.state, _ = self.train_step(self.state, tokens)
            seconds.append(time.perf_counter() - begin)
            self.wait()
        return 1e3 * float(np.median(seconds))

    def memory(self) -> dict[str, Any]:
        peak = peak_bytes(self.device)
        temporaries = temporary_bytes(self.train_step, self.state, self.numbered(0)) * self.placement.n_devices
        kinds = {"libraries": self.libraries, "state": bytes_of(self.state), "temporaries": temporaries}
        return {"peak_bytes": peak, "memory": kinds}


class Tuning(Training):
    """Tunes on prepared conversations. A subclass has the methods that are declared here."""

    made: Any  # (step) -> Batch, int: the batch of a step, and its places that hold text.
    shapes: Any  # () -> list of Batch: one of each shape that there is.

    at = 0  # The next batch.

    def warm(self) -> None:
        """Compiles for all shapes."""
        for batch in self.shapes():
            self.train(self.placement.split(batch, 1))
        self.wait()

    def losses(self, parameters: Arrays, count: int) -> list[float]:
        """Those of the first steps; starts anew before and after."""
        self.start(parameters)
        losses = [float(self.train(self.placement.split(self.made(step)[0], 1))) for step in range(count)]
        self.start(parameters)
        return losses

    def tune(self, count: int) -> Tuned:
        """Trains on the next batch, and then on so many as the loop of a run does, which alone are counted."""
        from gpt_jax.data.loader import Prefetch

        def ready(step: int) -> tuple[Batch, np.ndarray]:
            batch, text = self.made(step)
            return self.placement.split(batch, 1), np.array([batch.mask.sum(), text, batch.mask.size])

        counts, steps = np.zeros(3, int), range(self.at, self.at + 1 + count)
        self.at = steps.stop
        with Prefetch(ready, steps) as prefetched:
            batches = iter(prefetched)
            self.train(next(batches)[0])
            self.wait()
            begin = time.perf_counter()
            for batch, counted in batches:
                self.train(batch)
                counts += counted
            self.wait()
            return Tuned(time.perf_counter() - begin, *counts.tolist())


class Packed(Tuning):
    """Its rows are packed, as a run packs conversations."""

    def __init__(self, preset: Preset, parallel: ParallelConfig, folder: str) -> None:
        """folder: of prepared conversations."""
        from gpt_jax.data.folders import together
        from gpt_jax.data.shards import open_dataset

        super().__init__(preset, parallel)
        config = DataConfig(dir=folder, batch_size=preset.batch_size, packing="documents")
        self.batches = together([open_dataset(Path(folder))], config).batches(preset.model.context_length, seed=0)

    def made(self, step: int) -> tuple[Batch, int]:
        [(_, rows)], T = self.batches.sources, self.preset.model.context_length
        lengths = [sum(n for _, n in rows.places(row, shift)) for _, row, shift in self.batches.drawn(step)]
        return self.batches(step), sum(min(length, T) for length in lengths)

    def shapes(self) -> list[Batch]:
        return [self.batches(0)]


class Padded(Tuning):
    """Each row is a conversation."""

    def __init__(self, preset: Preset, parallel: ParallelConfig, conversations: Conversations) -> None:
        """conversations: in the order in which they are trained on."""
        super().__init__(preset, parallel)
        self.conversations = conversations
        self.lengths = [preset.model.context_length * quarters // 4 for quarters in (1, 2, 3, 4)]

    def made(self, step: int) -> tuple[Batch, int]:
        B = self.preset.batch_size
        rows = self.conversations[step * B : (step + 1) * B]
        lengths = [len(tokens) for tokens, _ in rows]
        T = next(T for T in self.lengths if max(lengths) <= T + 1)
        return self.padded(rows, T), sum(min(length, T) for length in lengths)

    def padded(self, rows: Conversations, T: int) -> Batch:
        """Rows of T places, and empty ones that fill up the batch."""
        B = self.preset.batch_size
        tokens_BS, mask_BT = np.zeros((B, T + 1), np.int32), np.zeros((B, T), bool)
        for b, (tokens, learnt) in enumerate(rows):
            tokens_BS[b, : len(tokens)] = tokens
            mask_BT[b, : len(tokens) - 1] = learnt[1:]
        return Batch(tokens_BS, mask_BT)

    def shapes(self) -> list[Batch]:
        return [self.padded([], T) for T in self.lengths]


class Rewards:
    """Tunes on the rewards of its own answers, built and called as the loop of a run does it."""

    def __init__(self, preset: Preset, parallel: ParallelConfig, answers: int, new: int) -> None:
        """preset: its batch is of problems; answers: to each of them, of so many new tokens."""
        from benchmarks.letters import PROMPT
        from gpt_jax.config import GrpoConfig, ObjectiveConfig
        from gpt_jax.environments.environment import Problems, open_environment
        from gpt_jax.tokenizer.bytes import ByteTokenizer
        from gpt_jax.train.tasks.rewards import RewardSource, RewardTask

        name, tokenizer = "benchmarks.letters:Letters", ByteTokenizer()
        grpo = GrpoConfig(name, (), answers, max_prompt_tokens=PROMPT, max_new_tokens=new, overlong="keep")
        config = Config(
            init_from="none",  # Which there must be, and nothing here reads.
            model=preset.model,
            data=DataConfig(batch_size=preset.batch_size),
            objective=ObjectiveConfig("grpo", grpo=grpo),
            optimizer=preset.optimizer,
            parallel=parallel,
        )
        runtime.setup(runtime.choose_cpu_devices(config))
        self.placement = choose_placement(parallel, preset.model, runtime.choose_devices(parallel))
        self.model = GPT(resolve_for(preset.model, self.placement.devices[0]))
        source = RewardSource(grpo, Problems(open_environment(name), name), tokenizer, [])
        self.task = task = RewardTask(config, source, self.model, self.placement)
        bias = tuple((token, -100.0) for token in sorted(tokenizer.stop_ids))  # Every answer is as long as it may be.
        filters = dataclasses.replace(task.settings.filters, logit_bias=bias)
        task.settings = dataclasses.replace(task.settings, filters=filters)
        schedule = learning_rate_schedule(preset.optimizer, config.train.steps)
        optimizer = make_optimizer(preset.optimizer, config.train.steps)
        step = make_train_step(task.objective, self.model, optimizer, schedule, 0, self.placement.axis_name)
        self.train_step = self.placement.jit(step, donate=True)
        self.state: TrainState = self.placement.make(lambda: init_state(self.model, optimizer, 0))

    def initial(self) -> Arrays:
        """The parameters to start from."""
        return arrays_of(self.state.params)

    def start(self, parameters: Arrays) -> None:
        """Nothing to do: the others start from these parameters, which are ours."""

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """The log-probabilities of all tokens but the first, float32 (B, T), of int32 (B, T + 1)."""
        tokens_B1S = tokens[:, None]
        batch = self.placement.split(Batch(tokens_B1S, np.ones_like(tokens_B1S[..., 1:], bool)), 1)
        return self.placement.gather(self.task.logprobs(self.task.logprobs_step, self.state.all_params(), batch))[:, 0]

    def seconds(self, first: int, count: int) -> list[float]:
        """Seconds of each of so many steps, after one that is not timed."""
        ends = []
        with self.task.feed(range(first, first + 1 + count)) as feed:
            for step in range(first, first + 1 + count):
                batch, _ = feed(step, self.state)
                self.state, _ = self.train_step(self.state, batch)
                if self.placement.must_wait:
                    jax.block_until_ready(self.state)
                ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def parts(self, first: int, count: int) -> dict[str, float]:
        """What a step is made of, medians of so many steps after one that is not timed: the shares of the time that
        answers, waiting for their rewards, and training take, each waited for, and the tokens of answers a second, in
        the step and for the same answers without judges."""
        found = []
        with self.task.feed(range(first, first + 1 + count)) as feed:
            for step in range(first, first + 1 + count):
                prompts = self.prompts(step)
                begin = time.perf_counter()
                for _ in self.task.rollouts(
                    self.state.all_params(), prompts, self.task.grpo.group_size, self.task.settings, step
                ):
                    pass
                alone = time.perf_counter() - begin
                batch, facts = jax.block_until_ready(feed(step, self.state))
                trains = time.perf_counter()
                self.state, _ = jax.block_until_ready(self.train_step(self.state, batch))
                end = time.perf_counter()
                total, rollout = end - begin - alone, facts["rollout_ms"] / 1e3
                found.append(
                    {
                        "rollout_share": rollout / total,
                        "judging_share": facts["judging_ms"] / 1e3 / total,
                        "training_share": (end - trains) / total,
                        "answer_tokens_per_second": facts["step_tokens"] / rollout,
                        "answer_tokens_per_second_alone": facts["step_tokens"] / alone,
                    }
                )
        return {key: float(np.median([each[key] for each in found[1:]])) for key in found[0]}

    def prompts(self, step: int) -> list[list[int]]:
        """The prompts of a step."""
        ask, read = self.task.source.problems.ask, self.task.rollouts.prompt_tokens
        return [ask("train", number, read)[1] for number in self.task.drawn(step)]


class Decoding(contestants.Decoding):
    """Answers prompts as `gpt_jax.sample.generate` does, on an engine with a slot for each."""

    def __init__(self, model: ModelConfig, quantize: bool = False) -> None:
        """model: the weights are held in its dtype, or if `quantize`, in int8."""
        runtime.setup()
        self.quantize = quantize
        self.device = runtime.local_devices()[0]
        self.libraries = memory_of_libraries(self.device.platform == "cpu")
        self.model = GPT(resolve_for(model, self.device))
        self.host = jax.local_devices(backend="cpu")[0]

    def initial(self) -> Arrays:
        """Random weights, made on the host: the peak of a GPU's memory cannot be counted anew, and is then that of the
        answers alone."""
        with jax.default_device(self.host):
            return arrays_of(jax.jit(lambda: init_params(self.model, jax.random.key(0)))())

    def ready(self, parameters: Arrays) -> None:
        from gpt_jax.interop.save import parts_of
        from gpt_jax.run.quantized import quantized, tree_of
        from gpt_jax.sample.decode import prepare_params

        c = self.model.config
        with jax.default_device(self.host):
            if self.quantize:
                laid_out = tree_of(dict(quantized(parts_of(traverse_util.unflatten_dict(parameters, sep="/")), c)))
            else:
                params = {path: jnp.asarray(x, c.dtype) for path, x in parameters.items()}
                laid_out = prepare_params(traverse_util.unflatten_dict(params, sep="/"), c)
        self.params = jax.block_until_ready(jax.device_put(laid_out, self.device))

    @functools.cache  # noqa: B019 (there is one for all the time of a process)
    def engine(self, batch: int, places: int) -> "Engine":
        """The engine of a case; its caches are there before the clock runs, as the others' programs are."""
        from gpt_jax.sample.engine import ALL_CHUNKS, Engine

        engine = Engine(self.model, self.params, batch, chunks_a_turn=ALL_CHUNKS)
        engine.reserve(places)
        return engine

    def decode(self, batch: int, prompt: int, new: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """New tokens, int32 (B, new), and their log-probabilities, float32 (B, new), on the host."""
        from gpt_jax.sample.engine import Request
        from gpt_jax.sample.settings import Filters

        engine, V = self.engine(batch, prompt + new), self.model.config.vocab_size
        engine.forget()
        filters = Filters(temperature=1.0 if top_k else 0.0, top_k=top_k, top_p=1.0)
        requests = [Request(row.tolist(), new, filters, seed=(0, 0, 0)) for row in prompts(V, batch, prompt)]
        tokens_BN, logprobs_BN = zip(*answers_to(requests, engine), strict=True)
        return np.array(tokens_BN, np.int32), np.array(logprobs_BN, np.float32)

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> np.ndarray:
        return self.decode(batch, prompt, new, top_k)[0]

    def greedy(self, batch: int, prompt: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        return self.decode(batch, prompt, new, 0)

    def memory(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """The temporaries are those of the program that needs the most."""
        from gpt_jax.sample.decode import chunk_sizes, decode_n, prefill_chunk

        peak = peak_bytes(self.device)
        engine, c = self.engine(batch, prompt + new), self.model.config
        keep_S, tokens_1T = np.ones(batch, bool), np.zeros((1, chunk_sizes(c)[-1]), np.int32)
        blocks = self.model, self.params, engine.state, keep_S, np.int32(1), c.vocab_size
        chunks = self.model, self.params, engine.prompt_cache, tokens_1T, np.int32(0)
        temporaries = max(temporary_bytes(decode_n, *blocks), temporary_bytes(prefill_chunk, *chunks))
        held = bytes_of((self.params, engine.state.cache, engine.prompt_cache))
        kinds = {"libraries": self.libraries, "state": held, "temporaries": temporaries}
        return {"peak_bytes": peak, "memory": kinds}


class Serving(Decoding):
    """Answers a list of requests: continuously, so that a slot that becomes free takes the next one, or in batches that
    wait for their longest."""

    def __init__(self, model: ModelConfig, continuous: bool) -> None:
        super().__init__(model)
        self.continuous = continuous

    def serve(self, asked: Asked, slots: int) -> tuple[float, list[list[int]]]:
        from gpt_jax.sample.engine import Request
        from gpt_jax.sample.settings import Filters

        engine = self.engine(slots, max(len(prompt) + new for prompt, new in asked))
        engine.forget()
        requests = [Request(prompt, new, Filters(temperature=0.0)) for prompt, new in asked]
        at_once = len(asked) if self.continuous else slots
        begin = time.perf_counter()
        answers = [
            tokens
            for at in range(0, len(requests), at_once)
            for tokens, _ in answers_to(requests[at : at + at_once], engine)
        ]
        return time.perf_counter() - begin, answers


class Chat(Decoding):
    """Answers the last turn of a chat, whose history was read before, or is read with it."""

    def __init__(self, model: ModelConfig, cached: bool) -> None:
        super().__init__(model)
        self.cached = cached

    def first_token(self, history: int, turn: int, new: int) -> tuple[float, int]:
        """Seconds from a turn of so many tokens to the first token of its answer, which may have `new`; that token."""
        from gpt_jax.sample.engine import Request
        from gpt_jax.sample.settings import Filters

        [tokens] = prompts(self.model.config.vocab_size, 1, history + turn).tolist()
        engine = self.engine(1, history + turn + new)
        engine.forget()
        if self.cached:  # As `gpt_jax sample --chat` does while the user writes.
            engine.read(tokens[:history])
        jax.block_until_ready(engine.prompt_cache)
        begin = time.perf_counter()
        id = engine.submit(Request(tokens, new, Filters(temperature=0.0)))
        while not (found := engine.turn()):
            pass
        seconds = time.perf_counter() - begin
        engine.cancel(id)
        while not engine.is_idle:
            engine.turn()
        return seconds, found[0].tokens[0]


class FromFile(Decoding):
    """Answers prompts with a published model, such as one in a GGUF file."""

    def __init__(self, path: str, **how: Any) -> None:
        """how: the options of `load_model`."""
        from gpt_jax.run.load import load_model, open_source
        from gpt_jax.sample.decode import prepare_params

        runtime.setup()
        self.model, params, _ = load_model(open_source(path), **how)
        self.params = prepare_params(params, self.model.config, donate=True)


def answers_to(requests: Sequence["Request"], engine: "Engine") -> Iterable[tuple[list[int], list[float]]]:
    """The tokens and log-probabilities of the answer to each, on an engine that has nothing else to do."""
    rows: dict[int, tuple[list[int], list[float]]] = {engine.submit(request): ([], []) for request in requests}
    while not engine.is_idle:
        for progress in engine.turn():
            tokens, logprobs = rows[progress.id]
            tokens += progress.tokens
            logprobs += progress.logprobs
    return rows.values()


def peak_bytes(device: jax.Device) -> int:
    """Most memory that was in use so far: a GPU's, or the process's."""
    stats = device.memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats else peak_memory()


def temporary_bytes(step: Any, *arguments: Any, **static: Any) -> int:
    """Bytes that a compiled function needs besides its arguments and results, on each device, as XLA says."""
    return step.lower(*arguments, **static).compile().memory_analysis().temp_size_in_bytes


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays, on all the devices that they lie on."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


def arrays_of(tree: Any) -> Arrays:
    """A tree's arrays on the host, by path."""
    return {path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree, sep="/").items()}
