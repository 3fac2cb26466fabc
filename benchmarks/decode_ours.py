"""gpt_jax as a contestant in decoding."""

from typing import Any

import jax
import numpy as np

from benchmarks.decode import prompts
from benchmarks.ours import bytes_of, temporary_bytes, write_tree
from benchmarks.worker import forget_peak, peak_memory, resident_memory, seconds_of
from gpt_jax import runtime
from gpt_jax.config import config_from_dict
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT, init_params
from gpt_jax.sample.decode import CHUNK, Decoder, bucket, decoder_for, prepare_params
from gpt_jax.sample.settings import Filters


class Decoding:
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
        write_tree(path, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), self.params))

    def ready(self) -> None:
        """Lays out the weights for decoding. What was needed for that and is not needed any more is given back."""
        with jax.default_device(self.host):
            self.params = prepare_params(self.params, self.model.config)
        self.params = jax.block_until_ready(jax.device_put(self.params, self.device))
        forget_peak()

    def decoder(self, top_k: int) -> Decoder:
        """Greedy, or draws from the top_k."""
        filters = Filters(temperature=1.0 if top_k else 0.0, top_k=top_k)
        return decoder_for(self.model, filters, self.model.config.vocab_size)

    def inputs(self, batch: int, prompt: int, new: int) -> tuple[tuple[Any, ...], int]:
        """The arguments of `prefill`, and the length of the cache."""
        c = self.model.config
        cache_length = bucket(prompt + new, c.context_length)
        tokens_BT = np.zeros((batch, bucket(prompt, cache_length)), np.int32)
        tokens_BT[:, :prompt] = prompts(c.vocab_size, batch, prompt)
        length_B, keys_B = np.full(batch, prompt, np.int32), jax.random.split(jax.random.key(0), batch)
        return (self.params, tokens_BT, length_B, 0, keys_B, None), cache_length

    def answer(self, batch: int, prompt: int, new: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """New tokens, int32 (B, new), and their log-probabilities, float32 (B, new), on the host."""
        decoder = self.decoder(top_k)
        inputs, cache_length = self.inputs(batch, prompt, new)
        state, logprobs_B = decoder.prefill(*inputs, cache_length=cache_length)
        tokens, logprobs = [np.asarray(state.last_B)], [np.asarray(logprobs_B)]
        while len(tokens) < new:
            n = min(CHUNK, new - len(tokens))
            state, tokens_NB, logprobs_NB = decoder.decode(self.params, state, n)
            tokens.extend(np.asarray(tokens_NB)[:n])
            logprobs.extend(np.asarray(logprobs_NB)[:n])
        return np.stack(tokens, axis=1), np.stack(logprobs, axis=1)

    def greedy(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """The most probable tokens and their log-probabilities, as lists."""
        tokens_BN, logprobs_BN = self.answer(batch, prompt, new, 0)
        return {"tokens": tokens_BN.tolist(), "logprobs": logprobs_BN.tolist()}

    def seconds(self, batch: int, prompt: int, new: int, top_k: int) -> float:
        """Seconds of an answer, from the prompts to the tokens on the host."""
        return seconds_of(lambda: self.answer(batch, prompt, new, top_k))

    def peak_bytes(self) -> int:
        """Most memory that was in use so far."""
        stats = self.device.memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else peak_memory()

    def memory(self, batch: int, prompt: int, new: int) -> dict[str, int]:
        """Bytes, by kind: the process with its libraries and devices, before there was any array; weights and cache;
        and the temporaries of the program that needs the most, by the account that XLA gives."""
        decoder = self.decoder(top_k=0)
        inputs, cache_length = self.inputs(batch, prompt, new)
        state, _ = decoder.prefill(*inputs, cache_length=cache_length)
        temporaries = max(
            temporary_bytes(decoder.prefill, *inputs, cache_length=cache_length),
            temporary_bytes(decoder.decode, self.params, state, 1),
        )
        return {"libraries": self.libraries, "state": bytes_of((self.params, state.cache)), "temporaries": temporaries}
