"""What writes answers to problems."""

import dataclasses

from gpt_jax.config import ParallelConfig
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import choose_placement
from gpt_jax.runtime import choose_devices
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.rollouts import EVALUATION, Rollouts
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny


def test_the_cache_is_as_long_as_answers_need() -> None:
    """And not as the context, which may be a hundred times as long: slots as long as a published model's would fill
    the memory."""
    config = dataclasses.replace(tiny.LLAMA, context_length=8192)
    placement = choose_placement(ParallelConfig(), config, choose_devices(ParallelConfig())[:1])
    params, prompts, settings = tiny.initial_params(config), [[72] * 60, [72] * 300], Settings(max_new_tokens=5)
    for n, most_tokens, places in ((1, 0, 64), (2, 0, 512), (1, 1000, 1024), (1, 100_000, 8192)):
        rollouts = Rollouts(GPT(config), placement, ByteTokenizer(), 0, 2 * n, 4, most_tokens)
        written = list(rollouts(params, prompts[:n], 2, settings, EVALUATION))
        assert sorted(number for *number, _ in written) == [[i, j] for i in range(n) for j in range(2)]
        assert isinstance(rollouts.engine, Engine)
        assert rollouts.engine.places == places
