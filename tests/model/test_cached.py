"""Attention of a chunk over the cache, by each backend, against the formula over the whole sequence."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import CacheDTypeName
from gpt_jax.model import cached
from gpt_jax.model.attention import masked_attention, visible
from gpt_jax.model.cache import LayerCache, Parts, cache_bytes, init_cache, rounded, starts
from tests import tiny


def cudnn_formula(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
    """What cuDNN's kernel is asked for, by JAX's own formula of it."""
    assert implementation == "cudnn"
    return dot_product_attention(*args, **kwargs, implementation="xla")


dot_product_attention = jax.nn.dot_product_attention

CASES = [(1, 2, 3, 512, 128, 256, 0), (2, 2, 2, 512, 16, 384, 0), (1, 2, 1, 512, 128, 384, 200), (2, 1, 2, 64, 9, 0, 6)]
CASES += [(1, 1, 2, 256, 16, 40, 0)]  # Begins within a block of places.
"""Sequences, key/value heads, queries to each, places, tokens, the first one's position, and the window."""


def in_int8(cache: LayerCache) -> LayerCache:
    """The cache, rounded."""
    (k_XSK, k_scale_XS1), (v_XSK, v_scale_XS1) = map(rounded, cache[:2])
    return LayerCache(k_XSK, v_XSK, k_scale_XS1, v_scale_XS1)


def filled(cache: LayerCache, value: float) -> LayerCache:
    """The cache with a value in all places, by its scales if it has them."""
    return jax.tree.map(lambda x: x if x.dtype == jnp.int8 else jnp.full_like(x, value), cache)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("backend", ["blocks", "cudnn", "splash"])
@pytest.mark.parametrize("case", CASES)
def test_a_chunk_sees_itself_and_all_before_it(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, backend: str, case: tuple[int, ...], is_int8: bool
) -> None:
    """What stands in the cache after the chunk, be it not a number where chunks begin on the grid, is not seen."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn_formula)
    B, G, R, S, T, start, window = case
    if backend == "splash" and T % 128:
        pytest.skip("Splash attends in steps of 128 tokens")
    K = 16
    q_BTHK = jnp.asarray(rng.normal(size=(B, T, G * R, K)), jnp.float32)
    layer_cache = LayerCache(*(jnp.asarray(rng.normal(size=(B * G, S, K)), jnp.float32) for _ in range(2)))
    layer_cache = in_int8(layer_cache) if is_int8 else layer_cache
    k_BSGK, v_BSGK = (x_XSK.reshape(B, G, S, K).swapaxes(1, 2) for x_XSK in layer_cache.plain(jnp.float32))
    mask_1TS = np.asarray(cached.chunk_mask(jnp.int32(start), T, S, window))[None]
    expected = masked_attention(q_BTHK, k_BSGK, v_BSGK, mask_1TS)

    # Fused kernels multiply by a weight of 0, and so do places of the block in which the chunk begins.
    unseen = jnp.nan if backend == "blocks" and start % cached.KEY_BLOCK == 0 else 1e6
    after = start + T
    layer_cache = jax.tree.map(
        lambda x, left: jnp.concatenate([x[:, :after], left[:, after:]], 1), layer_cache, filled(layer_cache, unseen)
    )
    own = k_BSGK[:, start:after], v_BSGK[:, start:after]
    attend: dict[str, Callable[..., jax.Array]] = {
        "blocks": functools.partial(cached.chunk_by_blocks, q_BTHK, *own),
        "cudnn": functools.partial(cached.chunk_by_cudnn, q_BTHK),
        "splash": functools.partial(cached.chunk_by_splash, q_BTHK, interpret=True),
    }
    ours = jax.jit(lambda cache, start: attend[backend](cache, start, window))(layer_cache, jnp.int32(start))
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_what_is_not_finite_is_seen_by_its_own_sequence_only(cache_dtype: CacheDTypeName) -> None:
    """Values that are not finite, whose keys are, as of a sum that is too large: those who see them find NaN, and the
    next sequence in the same places does not."""
    config = dataclasses.replace(tiny.ONE_LAYER, attention="xla", cache_dtype=cache_dtype)
    shape = 1, 4, config.kv_heads, config.head_dim
    q_BTHK, ones_BTGK = jnp.ones((1, 4, config.n_head, config.head_dim)), jnp.ones(shape)
    values_BTGK = ones_BTGK.at[:, 2].set(jnp.inf)

    def attend(cache: Parts, T: int, v_BTGK: jax.Array, start: int) -> tuple[jax.Array, Parts]:
        ours = q_BTHK[:, :T], ones_BTGK[:, :T], v_BTGK[:, :T]
        out_BTHK, cache = cached.cached_attention(*ours, cache, jnp.array([start]), config)
        return jnp.isnan(out_BTHK).any((0, 2, 3)), cache

    [cache] = init_cache(dataclasses.replace(config, n_layer=1), 1, 16)
    is_nan_T, cache = attend(cache, 4, values_BTGK, 0)
    assert is_nan_T.tolist() == [False, False, True, True]
    is_nan_T, cache = attend(cache, 1, ones_BTGK, 4)
    assert is_nan_T.tolist() == [True]
    is_nan_T, cache = attend(cache, 1, ones_BTGK, 0)  # The next sequence.
    assert is_nan_T.tolist() == [False]
    is_nan_T, cache = attend(cache, 1, ones_BTGK, 1)
    assert is_nan_T.tolist() == [False]


PART_SIZES = 8, 8, 16, 16


@pytest.fixture(params=[16, 1000], ids=["in turn", "together"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger parts are read for one row after the other, or for all at once."""
    monkeypatch.setattr(cached, "IN_TURN", request.param)


def decoding_case(rng: np.random.Generator, is_int8: bool) -> tuple[jax.Array, Parts, jax.Array, jax.Array]:
    """Queries of three rows, a cache in parts, and its keys and values in one: (B, S, G, K)."""
    B, S, G, R, K = 3, sum(PART_SIZES), 2, 3, 16
    q_B1HK = jnp.asarray(rng.normal(size=(B, 1, G * R, K)), jnp.float32)
    cache = LayerCache(*(jnp.asarray(rng.normal(size=(B * G, S, K)), jnp.float32) for _ in range(2)))
    cache = in_int8(cache) if is_int8 else cache
    ends = np.cumsum(PART_SIZES)
    parts = tuple(
        jax.tree.map(lambda x: x[:, end - size : end], cache)  # noqa: B023
        for end, size in zip(ends, PART_SIZES, strict=True)
    )
    k_BSGK, v_BSGK = (x_XSK.reshape(B, G, S, K).swapaxes(1, 2) for x_XSK in cache.plain(jnp.float32))
    return q_B1HK, parts, k_BSGK, v_BSGK


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize(
    "positions", [(0, 1, 2), (7, 3, 0), (8, 7, 2), (15, 16, 17), (31, 32, 0), (47, 46, 40), (20,) * 3]
)
def test_the_newest_token_sees_all_parts_of_the_cache(
    rng: np.random.Generator, positions: tuple[int, ...], window: int, is_int8: bool
) -> None:
    """As it sees a cache of one part, around the places where parts begin. Parts that no row has come to hold NaN. With
    a cache in int8, queries and weights are rounded to 15 bits."""
    q_B1HK, parts, k_BSGK, v_BSGK = decoding_case(rng, is_int8)
    position_B = jnp.array(positions)
    mask_B1S = visible(position_B[:, None, None] - jnp.arange(k_BSGK.shape[1]), window)
    expected = masked_attention(q_B1HK, k_BSGK, v_BSGK, mask_B1S)
    parts = tuple(
        part if first <= max(positions) else filled(part, jnp.nan)
        for part, first in zip(parts, starts(parts), strict=True)
    )
    ours = jax.jit(functools.partial(cached.newest_attention, window=window))(q_B1HK, parts, position_B)
    np.testing.assert_allclose(ours, expected, atol=2e-4 if is_int8 else 2e-6)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_does_not_depend_on_which_parts_the_others_read(rng: np.random.Generator, is_int8: bool) -> None:
    """To the last bit, whatever another sequence left where it has not come to."""
    q_B1HK, parts, *_ = decoding_case(rng, is_int8)

    def left_in(part: LayerCache) -> LayerCache:  # The heads of the first row. Two values add up to infinity.
        if part.v_scale_XS1 is not None:
            return part._replace(v_scale_XS1=part.v_scale_XS1.at[:2].set(3e38 / 127))
        return part._replace(v_XSK=part.v_XSK.at[:2].set(3e38))

    parts = parts[0], *map(left_in, parts[1:])
    attend = jax.jit(functools.partial(cached.newest_attention, window=0))
    alone, beside = (attend(q_B1HK, parts, jnp.array([5, *others])) for others in ((0, 0), (12, 47)))
    np.testing.assert_array_equal(alone[0], beside[0])


@pytest.mark.parametrize("S", [1024, 1536, 4096])
def test_many_small_weights_are_not_lost_beside_a_large_one(S: int) -> None:
    """In a cache in int8: each is 1 / 10,000 of the large one. They are rounded to 15 bits beside it, and exactly where
    it is not."""
    k_1SK = jnp.zeros((1, S, 16)).at[0, 0, 0].set(math.log(10_000) * 4)  # Queries are divided by 4.
    is_first_16 = jnp.arange(16) == 0  # What the large one has, and the others have not.
    cache = in_int8(LayerCache(k_1SK, jnp.broadcast_to(~is_first_16, (1, S, 16)).at[0, 0].set(is_first_16) * 1.0))
    q_11HK = jnp.ones((1, 1, 1, 16))
    ours = jax.jit(functools.partial(cached.newest_attention, window=0))(q_11HK, (cache,), jnp.array([S - 1]))
    expected_16 = np.where(is_first_16, 10_000, S - 1) / (S - 1 + 10_000)
    beside = math.gcd(S, 1024) / S
    np.testing.assert_allclose(ours[0, 0, 0], expected_16, rtol=0.25 * beside + 1e-3)


@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 3e38])
def test_rounding_is_off_by_half_a_step_at_most(rng: np.random.Generator, size: float) -> None:
    """A step is the largest number of a vector / 127. What has NaN has it as its scale."""
    x_XTK = jnp.asarray(rng.uniform(-1, 1, (3, 5, 16)), jnp.float32).at[0, 0].set(0) * size
    values_XTK, scale_XT1 = rounded(x_XTK)
    assert values_XTK.dtype == jnp.int8
    # Where scales are less than LEAST_STEP, all becomes 0.
    most_XT1 = np.maximum(0.501 * scale_XT1, 1e-30 if size < 1e-30 else 0)
    assert (np.abs(values_XTK * scale_XT1 - x_XTK) <= most_XT1).all()
    assert jnp.isnan(rounded(x_XTK.at[1, 2, 3].set(jnp.nan))[1]).sum() == 1


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_what_a_cache_takes(cache_dtype: CacheDTypeName) -> None:
    config = dataclasses.replace(tiny.LLAMA, dtype="bfloat16", cache_dtype=cache_dtype)
    cache = init_cache(config, 3, 8, 16)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 3 * cache_bytes(config, 24)
