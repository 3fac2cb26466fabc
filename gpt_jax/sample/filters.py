"""Filters of logits, and the draw of a token from them: pure functions of logits (S, V), in float32.

Every row has settings of its own, in arrays, so that other settings are not another program. What takes long runs only
when some row asks for it. Each filter sets the logits of the tokens that it excludes to -inf, and keeps at least one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.sample.settings import MOST_BIASES, Filters

NO_TOP_K = 2**31 - 1


class RowFilters(NamedTuple):
    """`Filters` as arrays, one element a row; in `row_filters`, of one row."""

    temperature_S: jax.Array  # float32, 0 or a normal number: greedy, or divides the logits.
    top_k_S: jax.Array  # int32; NO_TOP_K: all tokens.
    top_p_S: jax.Array  # float32; 1: all tokens.
    min_p_S: jax.Array  # float32; 0: all tokens.
    repetition_penalty_S: jax.Array  # float32; 1: none.
    presence_penalty_S: jax.Array  # float32; 0: none.
    frequency_penalty_S: jax.Array  # float32; 0: none.
    bias_tokens_SC: jax.Array  # int32; -1: none.
    bias_SC: jax.Array  # float32, added to the logits of these tokens.


def row_filters(filters: Filters) -> RowFilters:
    """The filters of one row, without the axis S."""
    tokens_C, bias_C = np.full(MOST_BIASES, -1, np.int32), np.zeros(MOST_BIASES, np.float32)
    for i, (token, bias) in enumerate(filters.logit_bias):
        tokens_C[i], bias_C[i] = token, bias
    # Beyond these bounds, float32 has no normal number, or no normal reciprocal, by which XLA may multiply instead.
    temperature = min(max(filters.temperature, 2.0**-126), 2.0**126) if filters.temperature else 0.0
    values: tuple[Any, ...] = (
        np.float32(temperature),
        np.int32(min(filters.top_k or NO_TOP_K, NO_TOP_K)),
        np.float32(filters.top_p),
        np.float32(filters.min_p),
        np.float32(filters.repetition_penalty),
        np.float32(filters.presence_penalty),
        np.float32(filters.frequency_penalty),
        tokens_C,
        bias_C,
    )
    return RowFilters(*values)


def adjust(
    filters: RowFilters, logits_SV: jax.Array, in_prompt_SV: jax.Array, counts_SV: jax.Array, is_active_S: jax.Array
) -> jax.Array:
    """The logits after bias and penalties. in_prompt_SV: bool, tokens of the prompt; counts_SV: int32, how often each
    token stands in the answer so far. What rows that are not active ask for may be left out."""
    f = filters
    is_penalised_S = (f.repetition_penalty_S != 1) | (f.presence_penalty_S != 0) | (f.frequency_penalty_S != 0)
    is_biased_S = jnp.any(f.bias_tokens_SC >= 0, axis=1)

    def penalise(logits_SV: jax.Array) -> jax.Array:
        logits_SV = penalise_repetition(logits_SV, in_prompt_SV | (counts_SV > 0), f.repetition_penalty_S[:, None])
        return penalise_presence(logits_SV, counts_SV, f.presence_penalty_S[:, None], f.frequency_penalty_S[:, None])

    def bias(logits_SV: jax.Array) -> jax.Array:
        return add_bias(logits_SV, f.bias_tokens_SC, f.bias_SC)

    logits_SV = only_if(jnp.any(is_active_S & is_biased_S), bias, logits_SV)
    return only_if(jnp.any(is_active_S & is_penalised_S), penalise, logits_SV)


def keep_allowed(logits_SV: jax.Array, allowed_SW: jax.Array, is_masked_S: jax.Array) -> jax.Array:
    """Keeps the tokens whose bits are set, see `Constraint.allowed`, in the rows that are masked."""
    S, V = logits_SV.shape
    bits_SV = (allowed_SW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1).reshape(S, -1)[:, :V]
    return jnp.where(is_masked_S[:, None] & (bits_SV == 0), -jnp.inf, logits_SV)


def apply(filters: RowFilters, logits_SV: jax.Array) -> jax.Array:
    """The logits to draw from, at the row's temperature, filtered by top-k, then top-p, then min-p. Those of greedy
    rows are of no use.

    The largest logit becomes 0, so that none overflows: as the temperature goes to 0, what is left is the most probable
    token, and as it goes to infinity, all tokens become as probable.
    """
    f = filters
    samples_S = f.temperature_S > 0
    most_S1 = jnp.max(logits_SV, axis=-1, keepdims=True)
    logits_SV = (logits_SV - most_S1) / jnp.where(samples_S, f.temperature_S, 1)[:, None]
    asks_k, asks_p = samples_S & (f.top_k_S < logits_SV.shape[1]), samples_S & (f.top_p_S < 1)
    logits_SV = only_if(jnp.any(asks_k), lambda x: keep_top_k(x, f.top_k_S), logits_SV)
    logits_SV = only_if(jnp.any(asks_p), lambda x: keep_top_p(x, f.top_p_S), logits_SV)
    return keep_min_p(logits_SV, f.min_p_S)


def only_if(condition: jax.Array, change: Callable[[jax.Array], jax.Array], logits_SV: jax.Array) -> jax.Array:
    """`change(logits)` in steps in which the condition holds, else the logits as they are."""
    return jax.lax.cond(condition, change, lambda x: x, logits_SV)


def add_bias(logits_SV: jax.Array, tokens_SC: jax.Array, bias_SC: jax.Array) -> jax.Array:
    """Adds to the logits of some tokens of each row; tokens of -1 stand for none."""
    V = logits_SV.shape[1]
    tokens_SC = jnp.where(tokens_SC < 0, V, tokens_SC)  # Beyond the end, which is dropped.
    return logits_SV.at[jnp.arange(len(logits_SV))[:, None], tokens_SC].add(bias_SC, mode="drop")


def penalise_repetition(logits_SV: jax.Array, seen_SV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divides positive logits of tokens that were seen by `penalty`, multiplies negative ones (Keskar et al. 2019)."""
    penalised_SV = jnp.where(logits_SV > 0, logits_SV / penalty, logits_SV * penalty)
    return jnp.where(seen_SV, penalised_SV, logits_SV)


def penalise_presence(
    logits_SV: jax.Array, counts_SV: jax.Array, presence: jax.Array | float, frequency: jax.Array | float
) -> jax.Array:
    """Subtracts `presence` from the logits of tokens in the answer, and `frequency` for each time (OpenAI's API)."""
    return logits_SV - jnp.where(counts_SV > 0, presence + frequency * counts_SV, 0)


def keep_top_k(logits_SV: jax.Array, k_S: jax.Array) -> jax.Array:
    """Keeps the k most probable tokens (Fan et al. 2018), and all that tie with the last of them."""
    few = lambda is_above_SDV: jnp.sum(is_above_SDV, axis=-1, dtype=jnp.int32) < k_S[:, None]  # noqa: E731
    return jnp.where(logits_SV < least(logits_SV, few)[:, None], -jnp.inf, logits_SV)


def keep_top_p(logits_SV: jax.Array, p_S: jax.Array) -> jax.Array:
    """Keeps the fewest tokens, most probable first, whose probabilities add up to p or more (Holtzman et al. 2020), and
    all that tie with the last of them."""
    probabilities_S1V = jax.nn.softmax(logits_SV, axis=-1)[:, None]
    p_S = jnp.where(p_S < 1, p_S, jnp.inf)  # As float32 adds up all of them, they may be more than 1.
    little = lambda is_above_SDV: jnp.sum(probabilities_S1V, axis=-1, where=is_above_SDV) < p_S[:, None]  # noqa: E731
    return jnp.where(logits_SV < least(logits_SV, little)[:, None], -jnp.inf, logits_SV)


def keep_min_p(logits_SV: jax.Array, p_S: jax.Array) -> jax.Array:
    """Keeps the tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    threshold_S = jnp.max(logits_SV, axis=-1) + jnp.log(p_S)
    return jnp.where(logits_SV < threshold_S[:, None], -jnp.inf, logits_SV)


def least(logits_SV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The least float32 (S,), at most the row's largest logit, for which `holds` is true of the tokens above it.

    holds: of a bool (S, D, V), to a bool (S, D); true of few tokens if it is true of more. Found are the bits of the
    float, each with a sum over the row. To sort the row, as others do, XLA:CPU takes sixteen times as long
    (V 49,152: 9.3 against 0.6 ms a row), and where the vocabulary is divided over devices, it would gather it.
    Accelerators find four bits at a time, by 15 sums: they wait for a sum to begin longer than it takes.
    """
    one, four = (functools.partial(least_by_bits, holds=holds, bits=bits) for bits in (1, 4))
    return jax.lax.platform_dependent(logits_SV, cpu=one, default=four)


def least_by_bits(logits_SV: jax.Array, holds: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
    """`least`, so many bits at a time, the highest first."""
    ordered_S1V = ordered(logits_SV)[:, None]
    digits_D = jnp.arange(1, 2**bits, dtype=jnp.int32)

    def next_bits(i: jax.Array, least_S: jax.Array) -> jax.Array:
        shift = 32 - bits * (i + 1)
        holds_SD = holds(ordered_S1V > (least_S[:, None] + (digits_D << shift) - 1)[..., None])
        return least_S + (jnp.sum(~holds_SD, axis=-1, dtype=jnp.int32) << shift)

    lowest_S = jnp.full(len(logits_SV), jnp.iinfo(jnp.int32).min)
    found_S = jax.lax.fori_loop(0, 32 // bits, next_bits, lowest_S)
    return as_float(jnp.clip(found_S, ordered(jnp.float32(-jnp.inf)), jnp.max(ordered_S1V, axis=(1, 2))))


def ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def as_float(x: jax.Array) -> jax.Array:
    """The inverse of `ordered`."""
    return jax.lax.bitcast_convert_type(x ^ ((x >> 31) & 0x7FFFFFFF), jnp.float32)


def draw(key: jax.Array, logits_V: jax.Array) -> jax.Array:
    """A token drawn from softmax(logits): first a block of tokens, then one token of that block.

    The distribution is that of `jax.random.categorical`, with 2 sqrt(V) random numbers in place of V (V 50257 on CPU:
    5.9 to 0.2 ms a row).
    """
    blocks_NC = in_blocks(logits_V[None], math.isqrt(logits_V.size))[0]
    block_key, token_key = jax.random.split(key)
    n = jax.random.categorical(block_key, jax.nn.logsumexp(blocks_NC, axis=-1))
    return n * blocks_NC.shape[1] + jax.random.categorical(token_key, blocks_NC[n])


def largest(logits_SV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest logits of each row, largest first, and their tokens, int32: (S, k) each.

    The k blocks with the largest maxima have them, since each of these maxima is no smaller than any logit outside of
    these blocks. So two short `top_k` replace one long one, for which XLA:CPU sorts the whole row.
    """
    S, V = logits_SV.shape
    block = math.isqrt(V // k)  # Then there are about as many blocks as logits in k blocks.
    blocks_SNC = in_blocks(logits_SV, block)
    best_SK = jax.lax.top_k(jnp.max(blocks_SNC, axis=-1), k)[1]
    candidates_SC = jnp.take_along_axis(blocks_SNC, best_SK[:, :, None], axis=1).reshape(S, -1)
    values_SK, places_SK = jax.lax.top_k(candidates_SC, k)
    blocks_SK = jnp.take_along_axis(best_SK, places_SK // block, axis=1)
    return values_SK, (blocks_SK * block + places_SK % block).astype(jnp.int32)


def in_blocks(logits_BV: jax.Array, size: int) -> jax.Array:
    """The logits of each row in blocks of `size`, (B, blocks, size), the last one padded with -inf."""
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -logits_BV.shape[1] % size)), constant_values=-jnp.inf)
    return padded_BV.reshape(logits_BV.shape[0], -1, size)
