"""The programs of sampling, compiled for large models without their arrays: what they need besides these."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.interop.load import part_shapes
from gpt_jax.model import cache as kv
from gpt_jax.model.backend import resolve
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.plan.targets import parse_target
from gpt_jax.run.quantized import quantized, tree_of
from gpt_jax.sample.decode import chunk_sizes, decode_n, init_state, prefill_chunk, prepare_params
from tests.plan.test_plan import LLAMA_7B

PROMPT = 8192

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")


def temporaries(config: ModelConfig, device: jax.Device) -> int:
    """Bytes that reading a chunk of a prompt needs, by the compiler's own account."""
    model = GPT(config)
    params = jax.eval_shape(lambda: prepare_params(init_params(model, jax.random.key(0)), config))
    cache = jax.eval_shape(lambda: kv.init_cache(config, 1, PROMPT))
    tokens_1T = jax.ShapeDtypeStruct((1, chunk_sizes(config)[-1]), jnp.int32)
    arguments = on_device((params, cache, tokens_1T, jax.ShapeDtypeStruct((), jnp.int32)), device)
    return temporaries_of(prefill_chunk.lower(model, *arguments))


def on_device(tree: Any, device: jax.Device) -> Any:
    """The shapes of arrays, on that device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def temporaries_of(lowered: jax.stages.Lowered) -> int:
    """Bytes that a program needs, by the compiler's own account."""
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


def llama_7b(platform: str, **changes: Any) -> ModelConfig:
    return resolve(dataclasses.replace(LLAMA_7B.model, context_length=PROMPT, **changes), platform)


@pytest.mark.slow
def test_a_long_prompt_takes_little_memory() -> None:
    """Llama 2's shapes at 7 billion parameters, all 32 layers: the scores of a whole prompt would be 8 GiB a layer."""
    assert temporaries(llama_7b("cpu"), jax.devices("cpu")[0]) < 2**26


@needs_libtpu
@pytest.mark.libtpu
@pytest.mark.slow
def test_a_long_prompt_takes_little_memory_on_a_tpu() -> None:
    """Through Splash. Layers use the same memory one after the other, so two of them tell."""
    config = llama_7b("tpu", n_layer=2)
    assert config.attention == "splash"
    assert temporaries(config, parse_target("v5e-4").devices()[0]) < 2**26


@needs_libtpu
@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("n_slots", [1, 8])
def test_matrices_in_int8_are_not_converted_in_memory_on_a_tpu(n_slots: int) -> None:
    """Decoding needs less besides its parameters than the largest of its matrices takes, 16 MiB, of 112 MiB in all: 4
    and 6 MiB. Matrices that are converted before the loop need 125 MiB, besides what the chip's own memory holds."""
    config = ModelConfig(vocab_size=8192, context_length=1024, n_layer=2, n_head=16, d_model=2048)
    config, shapes = resolve(config, "tpu"), part_shapes(config)
    assert config.dtype == "bfloat16"
    params = tree_of(dict(quantized(lambda leaf, i: np.zeros(shapes[leaf], np.float32), config)))
    state = jax.eval_shape(lambda: init_state(config, n_slots, 512))
    rest = jax.ShapeDtypeStruct((n_slots,), bool), jax.ShapeDtypeStruct((), jnp.int32)
    arguments = on_device((params, state, *rest), parse_target("v5e-4").devices()[0])
    matrices = [x.nbytes for x in jax.tree.leaves(params) if x.dtype == np.int8]
    assert (sum(matrices), max(matrices)) == (112 * 2**20, 16 * 2**20)
    lowered = decode_n.lower(GPT(config), *arguments, n_tokens=config.vocab_size)
    assert temporaries_of(lowered) < max(matrices)
