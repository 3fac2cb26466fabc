"""Decoding with a cache against the full pass, on a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import DTypeName
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT
from gpt_jax.model.head import head_logits, head_VD
from gpt_jax.sample.decode import CHUNK, Decoder, prepare_params
from gpt_jax.sample.settings import Filters
from tests.gpu.closeness import ROUNDING
from tests.gpu.models import MODELS, in_float32
from tests.gpu.test_train import params_of


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "bfloat16"), ("llama", "bfloat16"), ("llama", "float32")])
def test_cached_decoding_equals_the_full_pass(device: jax.Device, name: str, dtype: DTypeName) -> None:
    """The log-probabilities of the tokens drawn after prompts of several lengths: in float32 within 1e-4; in bfloat16,
    where the full pass is cuDNN's, within two roundings of logits of up to 10."""
    tolerance = 1e-4 if dtype == "float32" else 2 * 10 * ROUNDING
    config = MODELS[name] if dtype == "bfloat16" else in_float32(MODELS[name])
    model, params, T = GPT(config), jax.device_put(params_of(config), device), config.context_length
    lengths, n = np.array([1, 40, T - CHUNK - 1], np.int32), CHUNK
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(lengths), T), np.int32)
    prompts = tokens[:, : lengths.max()]

    # GPUs would multiply float32 in fewer bits.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        decoder, prepared = Decoder(model, Filters(temperature=0), config.vocab_size), prepare_params(params, config)
        keys_B = jax.random.split(jax.random.key(0), len(lengths))
        state, first_B = decoder.prefill(prepared, prompts, lengths, 0, keys_B, None, cache_length=T)
        first_token_B = np.asarray(state.last_B)
        _, more_NB, logprobs_NB = decoder.decode(prepared, state, n)

        drawn_NB = np.concatenate([first_token_B[None], np.asarray(more_NB)])
        ours_NB = np.concatenate([np.asarray(first_B)[None], np.asarray(logprobs_NB)])
        for row, length in enumerate(lengths):
            tokens[row, length : length + n + 1] = drawn_NB[:, row]

        def logprobs(params: Any, tokens_BT: jax.Array) -> jax.Array:
            hidden_ND = forward(model, params, tokens_BT).reshape(-1, config.d_model)
            logits_NV = head_logits(hidden_ND, head_VD(params), config.vocab_size)
            return jax.nn.log_softmax(logits_NV).reshape(*tokens_BT.shape, -1)

        full_BTV = np.asarray(jax.jit(logprobs)(params, jnp.asarray(tokens)))
    for row, length in enumerate(lengths):
        full_NV = full_BTV[row, length - 1 : length + n]
        expected_N = full_NV[np.arange(n + 1), drawn_NB[:, row]]
        np.testing.assert_allclose(ours_NB[:, row], expected_N, atol=tolerance)
        # Greedy: what was drawn is the likeliest, but for what the tolerance leaves open.
        assert np.all(expected_N >= full_NV.max(axis=-1) - 2 * tolerance)
