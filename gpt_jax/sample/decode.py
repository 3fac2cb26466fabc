"""The jitted core of sampling: prefills a batch of prompts, then decodes many tokens in one call to the device.

Shapes are static: prompts and the cache are padded to powers of two, so that programs are compiled once per bucket and
not once per length. Rows are independent: each has its own length and its own random keys, and gets the same result as
it would alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.config import ModelConfig
from gpt_jax.model import cache as kv
from gpt_jax.model.forward import forward_cached
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.loss import nats_N
from gpt_jax.sample.filters import apply, draw
from gpt_jax.sample.settings import Filters

CHUNK = 32
"""The most tokens decoded in one call: enough to hide the cost of a call, few enough for streaming to look alive."""


class DecodeState(NamedTuple):
    """The state of a batch of sequences, which each token updates."""

    cache: kv.Cache
    last_B: jax.Array  # int32: the newest token, not yet in the cache.
    length_B: jax.Array  # int32: number of tokens in the cache; the position of the newest token.
    drawn: jax.Array  # int32: number of tokens drawn so far, the same for all rows; with a key, it decides the draw.
    keys_B: jax.Array  # One random key per sequence.
    seen_BV: jax.Array | None  # bool: tokens of the prompt and the answer; None without a repetition penalty.


def prepare_params(params: Params, config: ModelConfig, donate: bool = False) -> Params:
    """The parameters in the form that decoding reads fastest; those that are prepared already stay as they are.

    Layers are unstacked, since decoding would copy each out of the stack for every token. Kernels are transposed for
    `decoding_product`. Matrices are rounded to the compute dtype of `config`, since each product would convert them for
    every token. Embeddings are rounded, too, before they are added up.

    donate: the given arrays may be deleted, each as soon as its prepared form exists, so that at most one of them is in
    memory twice.
    """
    if isinstance(params["layers"], tuple):
        return params

    def replace(old: jax.Array, new: Any) -> Any:
        if donate and new is not old:
            jax.block_until_ready(new)
            old.delete()
        return new

    def prepare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: prepare(part) for name, part in value.items()}
        return value if value.ndim < 2 or value.dtype == config.dtype else replace(value, value.astype(config.dtype))

    def prepare_layers(value: Any, kernel: bool = False) -> tuple[Any, ...]:
        if not isinstance(value, dict):
            layers = tuple(layer_of(value, i, config.dtype, kernel) for i in range(config.n_layer))
            return replace(value, layers)
        parts = {
            "kernel_FD" if name == "kernel" else name: prepare_layers(part, name == "kernel")
            for name, part in value.items()
        }
        return tuple({name: part[i] for name, part in parts.items()} for i in range(config.n_layer))

    return {name: prepare_layers(part) if name == "layers" else prepare(part) for name, part in params.items()}


@functools.partial(jax.jit, static_argnames=("dtype", "kernel"))
def layer_of(stacked: jax.Array, i: int, dtype: str, kernel: bool) -> jax.Array:
    """The part of layer i in a stacked leaf: kernels transposed, matrices in `dtype`."""
    layer = stacked[i].T if kernel else stacked[i]
    return layer.astype(dtype) if layer.ndim >= 2 else layer


class Decoder:
    """Prefill and decoding of one model, with parameters from `prepare_params`.

    `n_tokens` is the size of the tokenizer's vocabulary; ids beyond it, the padding of a model's, are never drawn.
    """

    def __init__(self, model: GPT, filters: Filters, n_tokens: int) -> None:
        self.model, self.filters, self.n_tokens = model, filters, n_tokens
        self.prefill = jax.jit(self._prefill, static_argnames="cache_length")
        self.decode = jax.jit(self._decode, donate_argnames="state")

    def _draw(self, logits_BV: jax.Array, state: DecodeState) -> tuple[DecodeState, jax.Array]:
        """Draws the next token of each row, and returns its log-probability (B,) under the model before any filter."""
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < self.n_tokens, logits_BV, -jnp.inf)
        filtered_BV = apply(self.filters, logits_BV, state.seen_BV)
        if self.filters.temperature == 0:
            tokens_B = jnp.argmax(filtered_BV, axis=-1)
        else:
            keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.drawn)
            tokens_B = jax.vmap(draw)(keys_B, filtered_BV)
        rows = jnp.arange(tokens_B.shape[0])
        seen_BV = None if state.seen_BV is None else state.seen_BV.at[rows, tokens_B].set(True)
        tokens_B = tokens_B.astype(jnp.int32)
        state = state._replace(last_B=tokens_B, drawn=state.drawn + 1, seen_BV=seen_BV)
        return state, -nats_N(logits_BV, tokens_B)

    def _prefill(
        self,
        params: Params,
        tokens_BT: jax.Array,
        length_B: jax.Array,
        drawn: jax.Array,
        keys_B: jax.Array,
        seen_BV: jax.Array | None,
        cache_length: int,
    ) -> tuple[DecodeState, jax.Array]:
        """Reads prompts of length_B tokens, padded at the end to T, into an empty cache, and draws the next token.

        The cache slots of the padding are never read: a sequence sees no slot beyond its own length, and overwrites
        those slots as it grows.
        """
        B = tokens_BT.shape[0]
        cache = kv.init_cache(self.model.config, B, cache_length)
        start_B = jnp.zeros(B, jnp.int32)
        hidden_BTD, cache = forward_cached(self.model, params, tokens_BT, cache, start_B)
        last_hidden_BD = hidden_BTD[jnp.arange(B), length_B - 1]
        state = DecodeState(cache, tokens_BT[:, 0], length_B, drawn, keys_B, seen_BV)
        return self._draw(logits_NV(self.model, params, last_hidden_BD), state)

    def _decode(self, params: Params, state: DecodeState, n: jax.Array) -> tuple[DecodeState, jax.Array, jax.Array]:
        """Decodes n <= CHUNK tokens of each row. Returns the state, tokens int32 (CHUNK, B) and log-probabilities
        float32 (CHUNK, B), of which the first n are valid."""
        B = state.last_B.shape[0]

        def body(
            i: jax.Array, carry: tuple[DecodeState, jax.Array, jax.Array]
        ) -> tuple[DecodeState, jax.Array, jax.Array]:
            state, tokens, logprobs = carry
            hidden_BTD, cache = forward_cached(self.model, params, state.last_B[:, None], state.cache, state.length_B)
            state = state._replace(cache=cache, length_B=state.length_B + 1)
            state, logprobs_B = self._draw(logits_NV(self.model, params, hidden_BTD[:, 0]), state)
            return state, tokens.at[i].set(state.last_B), logprobs.at[i].set(logprobs_B)

        empty = jnp.zeros((CHUNK, B), jnp.int32), jnp.zeros((CHUNK, B), jnp.float32)
        return jax.lax.fori_loop(0, n, body, (state, *empty))


@functools.cache
def decoder_for(model: GPT, filters: Filters, n_tokens: int) -> Decoder:
    """One decoder per set of arguments, so that a process compiles each program once."""
    return Decoder(model, filters, n_tokens)


def bucket(length: int, limit: int, least: int = 16) -> int:
    """The smallest power of two that is at least `length` and `least`, but no more than `limit`."""
    return min(limit, max(least, 1 << (length - 1).bit_length()))
