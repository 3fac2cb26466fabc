"""gpt_jax as a contestant: the one module of the benchmarks that runs it by its parts.

What learning does not need is imported where it is used: the time of imports is a part of what is measured there.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks import contestants
from benchmarks.contestants import Arrays, prompts, read_arrays
from benchmarks.measure import forget_peak, peak_memory, resident_memory
from benchmarks.presets import from_spec
from benchmarks.recipe import Windows
from gpt_jax import runtime
from gpt_jax.config import Config, DataConfig, ParallelConfig, config_from_dict
from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import Prefetch
from gpt_jax.model.backend import resolve
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.step import TrainState, init_state, make_eval_step, make_train_step


class Training(contestants.Training):
    """Trains a preset, placed as `train.py` would place it unless the arguments ask for something else."""

    def __init__(
        self, preset: dict[str, Any], parallel: dict[str, int] | None = None, parameters: str | None = None
    ) -> None:
        """preset: a Preset's spec; parallel: fields of ParallelConfig; parameters: a file of those to start from."""
        self.preset, self.parallel, self.parameters = from_spec(preset), ParallelConfig(**(parallel or {})), parameters
        model, data = self.preset.model, DataConfig(batch_size=self.preset.batch_size)
        config = Config(model=model, data=data, parallel=self.parallel)
        runtime.setup(runtime.choose_cpu_devices(config))
        self.placement = choose_placement(self.parallel, model, runtime.choose_devices(config))
        self.model = GPT(resolve(model, runtime.platform_name(self.placement.devices[0]), self.placement.context))
        self.libraries = resident_memory()
        self.optimizer = make_optimizer(self.preset.optimizer, self.preset.schedule_steps)
        self.train_step, self.make_state = self.build(self.optimizer)
        self.start()

    def build(self, optimizer: optax.GradientTransformation) -> tuple[Callable[..., Any], Callable[[], TrainState]]:
        """The jitted train step with an optimizer, and what makes its initial state."""
        schedule = learning_rate_schedule(self.preset.optimizer, self.preset.schedule_steps)
        step = make_train_step(next_token, self.model, optimizer, schedule, 0, self.placement.axis_name)
        step_fn = self.placement.jit(step, donate=True)
        return step_fn, lambda: self.placement.make(lambda: init_state(self.model, optimizer, 0))

    def start(self) -> None:
        self.state: TrainState
        if self.parameters is None:
            self.state = self.make_state()
        else:
            initial = traverse_util.unflatten_dict(read_arrays(self.parameters), sep="/")
            params = jax.device_put(initial, self.placement.state_shardings(initial))
            self.state = TrainState(jnp.int32(0), params, jax.jit(self.optimizer.init)(params), {})

    def how(self) -> dict[str, Any]:
        """What "auto" came to."""
        of_model = {name: getattr(self.model.config, name) for name in ("attention", "unroll", "dtype", "loss_chunk")}
        return {"devices": self.placement.n_devices, "mesh": self.parallel.uses_mesh, **of_model}

    def write_parameters(self, path: str) -> None:
        """Writes the parameters, by path: the initial ones, before any step."""
        np.savez(path, **arrays_of(self.state.params))  # type: ignore[arg-type]

    def gradients(self, tokens: Batch) -> Arrays:
        step, make_state = self.build(optax.trace(decay=0.0))  # Its state is the last gradients.
        state, _ = step(make_state(), tokens)
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

    def batches(self, windows: Windows, steps: int) -> Iterator[Batch]:
        with Prefetch(lambda step: self.put(windows.train(step)), range(steps)) as prefetched:
            yield from prefetched

    @functools.cached_property
    def eval_step(self) -> Callable[..., Any]:
        """The jitted evaluation step."""
        return self.placement.jit(make_eval_step(next_token, self.model, self.placement.axis_name), donate=False)

    def mean_loss(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        sums = []
        for tokens, mask_BT in batches:
            sums.append(self.eval_step(self.state.params, self.placement.split(Batch(tokens, mask_BT)))[:2])
            if self.placement.must_wait:
                jax.block_until_ready(sums[-1])
        loss, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(loss / count)

    def step_and_call_ms(self, count: int) -> tuple[float, float]:
        """Milliseconds of a step on a batch that is on the devices already, and of its call alone, until it returns:
        medians of so many steps, each of which is waited for."""
        tokens, called, done = self.numbered(0), [], []
        for _ in range(count):
            begin = time.perf_counter()
            self.state, _ = self.train_step(self.state, tokens)
            called.append(time.perf_counter() - begin)
            self.wait()
            done.append(time.perf_counter() - begin)
        return 1e3 * float(np.median(done)), 1e3 * float(np.median(called))

    def peak_bytes(self) -> int:
        return peak_bytes(self.placement.devices[0])

    def state_and_temporaries(self, **_: int) -> dict[str, int]:
        on_a_device = temporary_bytes(self.train_step, self.state, self.numbered(0))
        return {"state": bytes_of(self.state), "temporaries": on_a_device * self.placement.n_devices}


class Decoding(contestants.Decoding):
    """Answers prompts as `gpt_jax.sample.generate` does: the prompt in one call, then a call for every CHUNK tokens."""

    def __init__(self, model: dict[str, Any]) -> None:
        """model: a ModelConfig's fields. The weights are held in its dtype, and random.

        They are made and laid out on the host: the peak of a GPU's memory cannot be counted anew, and is then that of
        the answers alone.
        """
        runtime.setup()
        self.device = runtime.local_devices()[0]
        self.libraries = resident_memory()
        config = config_from_dict({"model": model}, "a benchmark").model
        self.model = GPT(resolve(config, runtime.platform_name(self.device)))
        dtype = self.model.config.dtype
        make = jax.jit(lambda: jax.tree.map(lambda x: x.astype(dtype), init_params(self.model, jax.random.key(0))))
        self.host = jax.local_devices(backend="cpu")[0]
        with jax.default_device(self.host):
            self.params = make()

    def write_parameters(self, path: str) -> None:
        """Writes the weights, float32, by path. To be called before `ready`, which lays them out anew."""
        np.savez(path, **{name: x.astype(np.float32) for name, x in arrays_of(self.params).items()})  # type: ignore[arg-type]

    def ready(self) -> None:
        """Lays out the weights for decoding. What was needed for that and is not needed any more is given back."""
        from gpt_jax.sample.decode import prepare_params

        with jax.default_device(self.host):
            self.params = prepare_params(self.params, self.model.config)
        self.params = jax.block_until_ready(jax.device_put(self.params, self.device))
        forget_peak()

    def prepare(self, batch: int, prompt: int, new: int, top_k: int = 0) -> tuple[Any, tuple[Any, ...], int]:
        """What decodes, greedily or from the top_k; the arguments of its `prefill`; and the length of the cache."""
        from gpt_jax.sample.decode import bucket, decoder_for
        from gpt_jax.sample.settings import Filters

        c = self.model.config
        decoder = decoder_for(self.model, Filters(temperature=1.0 if top_k else 0.0, top_k=top_k), c.vocab_size)
        cache_length = bucket(prompt + new, c.context_length)
        tokens_BT = np.zeros((batch, bucket(prompt, cache_length)), np.int32)
        tokens_BT[:, :prompt] = prompts(c.vocab_size, batch, prompt)
        length_B, keys_B = np.full(batch, prompt, np.int32), jax.random.split(jax.random.key(0), batch)
        return decoder, (self.params, tokens_BT, length_B, 0, keys_B, None), cache_length

    def decode(self, batch: int, prompt: int, new: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """New tokens, int32 (B, new), and their log-probabilities, float32 (B, new), on the host."""
        from gpt_jax.sample.decode import CHUNK

        decoder, inputs, cache_length = self.prepare(batch, prompt, new, top_k)
        state, logprobs_B = decoder.prefill(*inputs, cache_length=cache_length)
        tokens, logprobs = [np.asarray(state.last_B)], [np.asarray(logprobs_B)]
        while len(tokens) < new:
            n = min(CHUNK, new - len(tokens))
            state, tokens_NB, logprobs_NB = decoder.decode(self.params, state, n)
            tokens.extend(np.asarray(tokens_NB)[:n])
            logprobs.extend(np.asarray(logprobs_NB)[:n])
        return np.stack(tokens, axis=1), np.stack(logprobs, axis=1)

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> np.ndarray:
        return self.decode(batch, prompt, new, top_k)[0]

    def logprobs(self, batch: int, prompt: int, new: int) -> np.ndarray:
        return self.decode(batch, prompt, new, 0)[1]

    def peak_bytes(self) -> int:
        return peak_bytes(self.device)

    def state_and_temporaries(self, **case: int) -> dict[str, int]:
        """The temporaries are those of the program that needs the most."""
        decoder, inputs, cache_length = self.prepare(**case)
        state, _ = decoder.prefill(*inputs, cache_length=cache_length)
        prefill = temporary_bytes(decoder.prefill, *inputs, cache_length=cache_length)
        temporaries = max(prefill, temporary_bytes(decoder.decode, self.params, state, 1))
        return {"state": bytes_of((self.params, state.cache)), "temporaries": temporaries}


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
