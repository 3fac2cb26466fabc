"""The programs of sampling, compiled for large models without their arrays: what they need besides these."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.model import cache as kv
from gpt_jax.model.backend import resolve
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.plan.targets import parse_target
from gpt_jax.sample.decode import chunk_sizes, prefill_chunk, prepare_params
from tests.plan.test_plan import LLAMA_7B

PROMPT = 8192


def temporaries(config: ModelConfig, device: jax.Device) -> int:
    """Bytes that reading a chunk of a prompt needs, by the compiler's own account."""
    model, sharding = GPT(config), jax.sharding.SingleDeviceSharding(device)

    def shape(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.eval_shape(lambda: prepare_params(init_params(model, jax.random.key(0)), config))
    cache = jax.eval_shape(lambda: kv.init_cache(config, 1, PROMPT))
    tokens_1T = jax.ShapeDtypeStruct((1, chunk_sizes(config)[-1]), jnp.int32)
    arguments = jax.tree.map(shape, (params, cache, tokens_1T, jax.ShapeDtypeStruct((), jnp.int32)))
    compiled = prefill_chunk.lower(model, *arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


def llama_7b(platform: str, **changes: Any) -> ModelConfig:
    return resolve(dataclasses.replace(LLAMA_7B.model, context_length=PROMPT, **changes), platform)


@pytest.mark.slow
def test_a_long_prompt_takes_little_memory() -> None:
    """Llama 2's shapes at 7 billion parameters, all 32 layers: the scores of a whole prompt would be 8 GiB a layer."""
    assert temporaries(llama_7b("cpu"), jax.devices("cpu")[0]) < 2**26


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")
@pytest.mark.libtpu
@pytest.mark.slow
def test_a_long_prompt_takes_little_memory_on_a_tpu() -> None:
    """Through Splash. Layers use the same memory one after the other, so two of them tell."""
    config = llama_7b("tpu", n_layer=2)
    assert config.attention == "splash"
    assert temporaries(config, parse_target("v5e-4").devices()[0]) < 2**26
