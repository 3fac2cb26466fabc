"""The core of decoding: pure functions of a model's parameters, and of a cache with a slot for each of S sequences.

A prompt is read in chunks, by `prefill_chunk`, into a cache of one sequence, or together with others if it is short, by
`prefill_short`; `insert` copies that to a slot and says how the sequence goes on; `decode_n` draws tokens for all slots
at the same time. All settings of a sequence are elements of arrays, so that one compiled program serves them all.

The slots do not know each other. What a row draws depends on its tokens, its settings and its key, and each chunk of a
prompt is computed by the same program whatever stands in front of it; so a row comes out the same, to the last bit, in
any slot, in any company, and after a prefix that was read now or earlier.

The last token of a prompt is not read with the prompt: as `last`, it is the first that `decode_n` reads. So there is
one program that computes logits.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gpt_jax.config import ModelConfig
from gpt_jax.model import cache as kv
from gpt_jax.model.forward import forward_cached
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.loss import nats_N
from gpt_jax.model.sharding import BATCH_AXES, divide, in_parts, mesh_is_set, n_parts
from gpt_jax.sample.filters import RowFilters, adjust, apply, draw, keep_allowed, largest, only_if, row_filters
from gpt_jax.sample.settings import MOST_ALTERNATIVES, MOST_STOP_IDS, Filters

BLOCK = 32
"""The most tokens decoded in one call: enough to hide the cost of a call, few enough for streaming to look alive."""

STOP_IDS = 2 * MOST_STOP_IDS
"""Places for the tokens that end a text, those of the tokenizer included."""

WHOLE, PROMPTS = PartitionSpec(), PartitionSpec("tensor")
ROWS, SLOTS = PartitionSpec(BATCH_AXES), PartitionSpec((*BATCH_AXES, "tensor"))
"""What divides, on a mesh, the first dimension of caches of prompts, of all that slots have, and of their caches."""


Caches = TypeVar("Caches", kv.Cache, kv.LayerCache)


class Row(NamedTuple):
    """How one sequence goes on. In a `DecodeState`, all of them, with the axis S in front."""

    last: jax.Array  # int32: the newest token, not yet in the cache.
    length: jax.Array  # int32: number of tokens in the cache; the position of the newest token.
    drawn: jax.Array  # int32: number of tokens drawn so far, which decides the next draw together with
    seed: jax.Array  # uint32 (3,): the seed, and what tells sequences of the same seed apart.
    left: jax.Array  # int32: number of tokens that are still to be drawn; 0: the slot is idle.
    filters: RowFilters
    stop_ids: jax.Array  # int32 (STOP_IDS,): tokens that end the sequence; -1: none.
    alternatives: jax.Array  # int32: how many of the most probable tokens are wanted.
    in_prompt: jax.Array  # bool (V,): tokens of the prompt, for penalties.
    counts: jax.Array  # int32 (V,): how often each token stands in the answer so far.
    is_masked: jax.Array  # bool: only tokens that are allowed are drawn.
    allowed: jax.Array  # uint32 (ceil(V / 32),): the tokens that may come next, as bits, see `Constraint.allowed`.


class DecodeState(NamedTuple):
    """All slots: their cache, and how each sequence goes on."""

    cache: kv.Cache
    rows: Row


class Block(NamedTuple):
    """The tokens of up to BLOCK steps, N, of all slots."""

    is_drawn_NS: jax.Array  # bool: False where a slot was idle; then all else says nothing.
    tokens_NS: jax.Array  # int32.
    logprobs_NS: jax.Array  # float32: log-probabilities under the model, in nats, before bias, penalties and filters.
    drawn_logprobs_NS: jax.Array  # float32: those under the distribution that the tokens were drawn from.
    alternatives_NSC: jax.Array  # int32: the most probable tokens, where they are wanted.
    alternative_logprobs_NSC: jax.Array  # float32: their log-probabilities under the model.


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


def chunk_sizes(config: ModelConfig) -> tuple[int, ...]:
    """The lengths of chunks, shortest first. Prompts are read in chunks of the longest one; the rest of a prompt is
    padded to the shortest that will do. The caches have a multiple of the longest one of places; that of the slots may
    have half of it."""
    return (128, 256, 512) if config.attention in ("cudnn", "splash") else (16, 32, 64, 128)


def part_sizes(config: ModelConfig, places: int) -> tuple[int, ...]:
    """The sizes of the parts in which the slots' cache has so many places: half of the longest chunk, then each as many
    as all before it, so that no more than twice the places of the longest text are read."""
    ends = [chunk_sizes(config)[-1] // 2]
    while ends[-1] < places:
        ends.append(min(2 * ends[-1], places))
    return tuple(np.diff([0, *ends]).tolist())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_prompts(config: ModelConfig, n: int, places: int) -> kv.Cache:
    """An empty cache for n prompts, or parts of prompts, of up to `places` tokens."""
    return cast(kv.Cache, divide(kv.init_cache(config, n, places), PROMPTS))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(config: ModelConfig, n_slots: int, places: int) -> DecodeState:
    """Idle slots for sequences of up to `places` tokens."""
    row = make_row(config, [0], 0, 0, Filters(), ())
    rows = jax.tree.map(lambda x: jnp.zeros((n_slots, *np.shape(x)), np.asarray(x).dtype), row)
    return DecodeState(init_slots(config, n_slots, part_sizes(config, places)), divide(rows, ROWS))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_slots(config: ModelConfig, n_slots: int, sizes: tuple[int, ...]) -> kv.Cache:
    """An empty cache of all slots, in parts of these sizes."""
    return cast(kv.Cache, divide(kv.init_cache(config, n_slots, *sizes), SLOTS))


def make_row(
    config: ModelConfig,
    tokens: Sequence[int],
    n_prompt: int,
    left: int,
    filters: Filters,
    stop_ids: Sequence[int],
    *,
    start: int = 0,
    seed: tuple[int, int, int] = (0, 0, 0),
    alternatives: int = 0,
    is_masked: bool = False,
) -> Row:
    """The row of a sequence whose tokens from `start` to the last but one are in the cache; NumPy arrays.

    The first n_prompt tokens are the prompt, the others were drawn. left: number of tokens that are still to be drawn.
    is_masked: only tokens that are allowed are drawn, and none is allowed yet.
    """
    stops = np.full(STOP_IDS, -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    in_prompt, counts = np.zeros(config.embedding_rows, bool), np.zeros(config.embedding_rows, np.int32)
    in_prompt[list(tokens[:n_prompt])] = True
    np.add.at(counts, list(tokens[n_prompt:]), 1)
    values: tuple[Any, ...] = (
        np.int32(tokens[-1]),
        np.int32(len(tokens) - 1 - start),
        np.int32(len(tokens) - n_prompt),
        np.array(seed, np.uint32),
        np.int32(left),
        row_filters(filters),
        stops,
        np.int32(alternatives),
        in_prompt,
        counts,
        np.bool_(is_masked),
        np.zeros(-(-config.embedding_rows // 32), np.uint32),
    )
    return Row(*values)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill_chunk(model: GPT, params: Params, cache: kv.Cache, tokens_1T: jax.Array, start: jax.Array) -> kv.Cache:
    """Reads a chunk of a prompt into the cache of one sequence, from position `start` (int32) on.

    Its padding, at the end, is in the cache, too, where it is never read: a sequence sees no place beyond its own
    length, and overwrites these places as it grows.
    """
    return forward_cached(model, params, tokens_1T, cache, start[None])[1]


class Scores(NamedTuple):
    """What the model says of each of T tokens' successors."""

    logprobs_T: jax.Array  # float32: the log-probability of the token that follows, in nats.
    alternatives_TC: jax.Array  # int32: the most probable successors.
    alternative_logprobs_TC: jax.Array  # float32.
    hidden_TD: jax.Array  # float32: the hidden states after the last norm.


@functools.partial(jax.jit, static_argnames=("model", "n_tokens"), donate_argnames="cache")
def score_chunk(
    model: GPT,
    params: Params,
    cache: kv.Cache,
    tokens_1T: jax.Array,
    next_T: jax.Array,
    start: jax.Array,
    n_tokens: int,
) -> tuple[kv.Cache, Scores]:
    """Reads a chunk as `prefill_chunk` does, and scores the tokens that follow each of its own, next_T (int32)."""
    hidden_1TD, cache = forward_cached(model, params, tokens_1T, cache, start[None])
    logits_TV = logits_NV(model, params, hidden_1TD[0], n_tokens)
    values_TC, ids_TC = largest(logits_TV, min(MOST_ALTERNATIVES, n_tokens))
    alternatives_TC = values_TC - jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)
    scores = Scores(-nats_N(logits_TV, next_T), ids_TC, alternatives_TC, hidden_1TD[0].astype(jnp.float32))
    return cache, cast(Scores, divide(scores, WHOLE))


@functools.partial(jax.jit, static_argnames="model")
def prefill_short(model: GPT, params: Params, tokens_PT: jax.Array) -> kv.Cache:
    """A cache of P sequences and T places, with prompts that are shorter than the longest chunk; padded as in
    `prefill_chunk`. Short prompts that are read together fill the matrix units as a chunk does."""
    cache = kv.init_cache(model.config, *tokens_PT.shape)
    return forward_cached(model, params, tokens_PT, cache, jnp.zeros(len(tokens_PT), jnp.int32))[1]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def insert(model: GPT, state: DecodeState, slot: jax.Array, row: Row, cache: kv.Cache, at: jax.Array) -> DecodeState:
    """Puts a sequence into a slot, with the places of row `at` of a cache of prompts that hold its tokens."""
    longest, places = chunk_sizes(model.config)[-1], kv.places(cache)
    heads, is_divided = model.config.kv_heads // n_parts("tensor"), mesh_is_set()

    def on_one_device(
        slots: kv.Cache, rows: Row, slot: jax.Array, row: Row, cache: kv.Cache, at: jax.Array
    ) -> tuple[kv.Cache, Row]:
        length = row.length
        if is_divided:  # The slot's number among those of this device; if it is another's, nothing is copied.
            n = rows.left.shape[0]
            slot = slot - jax.lax.axis_index(BATCH_AXES) * n
            is_own = (slot >= 0) & (slot < n)
            slot, length = jnp.where(is_own, slot, n), jnp.where(is_own, length, 0)

        def filled(part: kv.LayerCache, first: int, prompt: kv.LayerCache) -> kv.LayerCache:
            size = part.k_XSK.shape[1]
            step = min(size, longest, places)

            def copy(i: jax.Array, part: kv.LayerCache) -> kv.LayerCache:
                return copy_places(heads, part, (slot, i * step), prompt, (at, first + i * step), step)

            n = jnp.clip(-(-(length - first) // step), 0, min(size, places - first) // step)
            return cast(kv.LayerCache, jax.lax.fori_loop(0, n, copy, part))

        slots = tuple(
            tuple(
                filled(part, first, prompt) if first < places else part
                for part, first in zip(parts, kv.starts(parts), strict=True)
            )
            for parts, (prompt,) in zip(slots, cache, strict=True)
        )
        return slots, jax.tree.map(lambda rows, one: rows.at[slot].set(one, mode="drop"), rows, row)

    put = in_parts(on_one_device, (SLOTS, ROWS, WHOLE, WHOLE, PROMPTS, WHOLE), (SLOTS, ROWS))
    return DecodeState(*put(state.cache, state.rows, slot, row, cache, at))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="target")
def move_chunks(model: GPT, target: kv.Cache, source: kv.Cache, moves_N4: jax.Array, n: jax.Array) -> kv.Cache:
    """Copies chunks of the longest size from one cache to another. The first n of the moves, int32, have the row and
    the place that a chunk comes to, and those that it comes from."""
    places, heads = chunk_sizes(model.config)[-1], model.config.kv_heads // n_parts("tensor")

    def on_one_device(target: kv.Cache, source: kv.Cache, moves_N4: jax.Array, n: jax.Array) -> kv.Cache:
        def move(i: jax.Array, target: kv.Cache) -> kv.Cache:
            to_row, to_place, from_row, from_place = moves_N4[i]
            return copy_places(heads, target, (to_row, to_place), source, (from_row, from_place), places)

        return jax.lax.fori_loop(0, n, move, target)

    copy = in_parts(on_one_device, (PROMPTS, PROMPTS, WHOLE, WHOLE), PROMPTS)
    return cast(kv.Cache, copy(target, source, moves_N4, n))


def copy_places(
    heads: int, target: Caches, to: tuple[Any, jax.Array], source: Caches, of: tuple[Any, jax.Array], places: int
) -> Caches:
    """The target with so many places copied, from a row and place of the source to those of the target. heads: those
    of keys and values that a row has."""

    def copy(to_XSK: jax.Array, from_XSK: jax.Array) -> jax.Array:
        size = heads, places, from_XSK.shape[2]
        chunk = jax.lax.dynamic_slice(from_XSK, (of[0] * heads, of[1], 0), size)
        return jax.lax.dynamic_update_slice(to_XSK, chunk, (to[0] * heads, to[1], 0))

    return cast(Caches, jax.tree.map(copy, target, source))


DECODING_OPTIONS = {
    # On a GPU, the whole loop becomes graphs that the GPU runs by itself. By default, the host starts each step, and
    # looks whether there is to be another one, for which the GPU waits: a third of the time.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    # On a CPU, vectors may be as wide as registers are. Sums in any order (fast math) would be faster still, but would
    # depend on how many places of the cache are read, and so a row on its neighbours.
    "xla_cpu_prefer_vector_width": 512,
}
"""How XLA compiles `decode_n`; other platforms pass over what is not theirs."""


@functools.partial(
    jax.jit,
    static_argnames=("model", "n_tokens"),
    donate_argnames="state",
    compiler_options=DECODING_OPTIONS,
)
def decode_n(
    model: GPT, params: Params, state: DecodeState, keep_S: jax.Array, n: jax.Array, n_tokens: int
) -> tuple[DecodeState, Block]:
    """Draws n <= BLOCK tokens for each slot, fewer where sequences end, and for no slot once all are idle.

    params: from `prepare_params`. keep_S: bool, false for slots that are to become idle first. n_tokens: the size of
    the tokenizer's vocabulary; ids beyond it, the padding of a model's, are never drawn.
    """
    S, C = keep_S.shape[0], min(MOST_ALTERNATIVES, n_tokens)
    rows = state.rows._replace(left=jnp.where(keep_S, state.rows.left, 0))
    empty = jax.tree.map(
        lambda x: jnp.zeros((BLOCK, *x.shape), x.dtype),
        Block(
            jnp.zeros(S, bool),
            jnp.zeros(S, jnp.int32),
            jnp.zeros(S),
            jnp.zeros(S),
            jnp.zeros((S, C), jnp.int32),
            jnp.zeros((S, C)),
        ),
    )

    def goes_on(carry: tuple[jax.Array, DecodeState, Block]) -> jax.Array:
        i, state, _ = carry
        return (i < n) & jnp.any(state.rows.left > 0)

    def body(carry: tuple[jax.Array, DecodeState, Block]) -> tuple[jax.Array, DecodeState, Block]:
        i, (cache, rows), block = carry
        positions_S = jnp.where(rows.left > 0, rows.length, 0)  # Nobody reads more of the cache for an idle slot.
        hidden_S1D, cache = forward_cached(model, params, rows.last[:, None], cache, positions_S)
        logits_SV = logits_NV(model, params, hidden_S1D[:, 0], n_tokens)
        rows, step = in_parts(functools.partial(draw_tokens, n_alternatives=C), (ROWS, ROWS), ROWS)(rows, logits_SV)
        return i + 1, DecodeState(cache, rows), jax.tree.map(lambda all, one: all.at[i].set(one), block, step)

    _, state, block = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state._replace(rows=rows), empty))
    return state, cast(Block, divide(block, WHOLE))  # Of which each host reads all.


def draw_tokens(rows: Row, logits_SV: jax.Array, n_alternatives: int) -> tuple[Row, Block]:
    """Draws the next token of each row; the rows after it, and a block of this one step, without its first axis."""
    S = logits_SV.shape[0]
    is_drawn_S = rows.left > 0
    filters = rows.filters._replace(temperature_S=jnp.where(is_drawn_S, rows.filters.temperature_S, 0))
    adjusted_SV = adjust(filters, logits_SV, rows.in_prompt, rows.counts, is_drawn_S)
    is_masked_S = is_drawn_S & rows.is_masked
    adjusted_SV = only_if(jnp.any(is_masked_S), lambda x: keep_allowed(x, rows.allowed, is_masked_S), adjusted_SV)
    is_greedy_S = filters.temperature_S == 0
    best_S = first_largest(adjusted_SV)

    def sample(adjusted_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        filtered_SV = apply(filters, adjusted_SV)
        drawn_S = jax.vmap(draw)(jax.vmap(draw_key)(rows.seed, rows.drawn), filtered_SV).astype(jnp.int32)
        tokens_S = jnp.where(is_greedy_S, best_S, drawn_S)
        return tokens_S, jnp.where(is_greedy_S, 0.0, -nats_N(filtered_SV, tokens_S))

    def choose(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return best_S, jnp.zeros(S)

    tokens_S, drawn_logprobs_S = jax.lax.cond(jnp.all(is_greedy_S), choose, sample, adjusted_SV)

    def alternatives(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        values_SC, ids_SC = largest(logits_SV, n_alternatives)
        return ids_SC, values_SC - jax.nn.logsumexp(logits_SV, axis=-1, keepdims=True)

    def none(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((S, n_alternatives), jnp.int32), jnp.zeros((S, n_alternatives))

    ids_SC, logprobs_SC = jax.lax.cond(jnp.any(is_drawn_S & (rows.alternatives > 0)), alternatives, none, logits_SV)
    step = Block(is_drawn_S, tokens_S, -nats_N(logits_SV, tokens_S), drawn_logprobs_S, ids_SC, logprobs_SC)
    ends_S = jnp.any(tokens_S[:, None] == rows.stop_ids, axis=1)
    one_S = is_drawn_S.astype(jnp.int32)
    return rows._replace(
        last=jnp.where(is_drawn_S, tokens_S, rows.last),
        length=rows.length + one_S,
        drawn=rows.drawn + one_S,
        left=jnp.where(ends_S, 0, rows.left - one_S),
        counts=rows.counts.at[jnp.arange(S), tokens_S].add(one_S),
    ), step


def first_largest(logits_SV: jax.Array) -> jax.Array:
    """The first of the most probable tokens of each row, int32 (S,). XLA:CPU finds the largest logit, and then its
    place, several times as fast as both at once."""
    V = logits_SV.shape[1]
    is_largest_SV = logits_SV == jnp.max(logits_SV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest_SV, jnp.arange(V), V), axis=-1) % V  # Where all are nan, the first token.


def draw_key(seed_3: jax.Array, drawn: jax.Array) -> jax.Array:
    """The key of a draw: a function of the sequence's seed, and of the number of tokens drawn before it."""
    key = jax.random.key(seed_3[0])
    for word in (seed_3[1], seed_3[2], drawn):
        key = jax.random.fold_in(key, word)
    return key


def bucket(length: int, limit: int, least: int = 16) -> int:
    """The smallest power of two that is at least `length` and `least`, but no more than `limit`."""
    return min(limit, max(least, 1 << (length - 1).bit_length()))
