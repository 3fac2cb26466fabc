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
from gpt_jax.sample.engine import Engine, Request
from gpt_jax.sample.settings import Filters
from tests.gpu.closeness import ROUNDING
from tests.gpu.models import MODELS, in_float32
from tests.gpu.test_train import params_of
from tests.sample.engines import Answers, random_requests


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "bfloat16"), ("llama", "bfloat16"), ("llama", "float32")])
def test_cached_decoding_equals_the_full_pass(device: jax.Device, name: str, dtype: DTypeName) -> None:
    """The log-probabilities of the tokens drawn after prompts of several lengths: in float32 within 1e-4; in bfloat16,
    where the full pass is cuDNN's, within two roundings of logits of up to 10."""
    tolerance = 1e-4 if dtype == "float32" else 2 * 10 * ROUNDING
    config = MODELS[name] if dtype == "bfloat16" else in_float32(MODELS[name])
    model, params, T = GPT(config), jax.device_put(params_of(config), device), config.context_length
    lengths, n = np.array([1, 40, T - 33], np.int32), 33
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(lengths), T), np.int32)

    # GPUs would multiply float32 in fewer bits.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        engine = Engine(model, params, len(lengths))
        greedy = Filters(temperature=0)
        requests = [Request(row[:m].tolist(), n, greedy) for row, m in zip(tokens, lengths, strict=True)]
        answers = Answers(engine).all(requests)
        drawn_NB, ours_NB = (np.array([answer[i] for answer in answers]).T for i in (0, 1))
        for row, length in enumerate(lengths):
            tokens[row, length : length + n] = drawn_NB[:, row]

        def logprobs(params: Any, tokens_BT: jax.Array) -> jax.Array:
            hidden_ND = forward(model, params, tokens_BT).reshape(-1, config.d_model)
            logits_NV = head_logits(hidden_ND, head_VD(params), config.vocab_size)
            return jax.nn.log_softmax(logits_NV).reshape(*tokens_BT.shape, -1)

        full_BTV = np.asarray(jax.jit(logprobs)(params, jnp.asarray(tokens)))
    for row, length in enumerate(lengths):
        full_NV = full_BTV[row, length - 1 : length + n - 1]
        expected_N = full_NV[np.arange(n), drawn_NB[:, row]]
        np.testing.assert_allclose(ours_NB[:, row], expected_N, atol=tolerance)
        # Greedy: what was drawn is the likeliest, but for what the tolerance leaves open.
        assert np.all(expected_N >= full_NV.max(axis=-1) - 2 * tolerance)


def test_an_answer_is_the_same_alone_and_among_others(device: jax.Device) -> None:
    """To the last bit, in any slot and any company, on engines of one shape; see tests/sample/test_engine.py."""
    config = MODELS["llama"]
    engine = Engine(GPT(config), jax.device_put(params_of(config), device), 8)
    requests = random_requests(0, 30, config.context_length)
    together = Answers(engine).all(requests)
    for number in range(0, 30, 3):
        engine.reset()
        assert Answers(engine).all([requests[number]]) == [together[number]]
