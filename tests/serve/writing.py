"""What models with random weights write, all at the same time, held to grammars."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt_jax.model.gpt import GPT
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.generate import Result, Row, write
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.serve.grammar import Grammar
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests import tiny


def answers(tokenizer: Tokenizer, grammars: Mapping[str, Grammar | None], **filters: Any) -> dict[str, Result]:
    """An answer for each grammar, by its name."""
    config = dataclasses.replace(tiny.ONE_LAYER, vocab_size=tokenizer.vocab_size, context_length=512)
    engine = Engine(GPT(config), tiny.random_params(config), 4, n_tokens=tokenizer.vocab_size)
    settings = Settings(500, seed=3, filters=Filters(**{"temperature": 1.5, "top_p": 1.0, **filters}))
    prompt = tokenizer.encode("JSON:")
    rows = [Row(prompt, tokenizer, settings, i, constraint=grammar) for i, grammar in enumerate(grammars.values())]
    for _ in write(engine, rows):
        pass
    assert not [row.error for row in rows if row.error]
    return {name: row.result for name, row in zip(grammars, rows, strict=True)}
