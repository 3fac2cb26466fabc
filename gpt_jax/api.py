"""The model that `gpt_jax.load` returns, for programs. The commands do the same from the terminal."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, overload

import jax
import numpy as np

from gpt_jax import runtime
from gpt_jax.config import ModelConfig, QuantizeName
from gpt_jax.data.formats import Block
from gpt_jax.errors import UserError
from gpt_jax.evaluate.loss import Tally, evaluate_blocks
from gpt_jax.evaluate.score import Scorer
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.placement import Placement
from gpt_jax.run.load import LoadedModel, load_model, open_source
from gpt_jax.runtime import own_numerics
from gpt_jax.sample.chat import fit, message
from gpt_jax.sample.decode import bucket, prepare_params
from gpt_jax.sample.engine import ALL_CHUNKS, Engine
from gpt_jax.sample.generate import MOST_SLOTS, Result, check_known, encode_prompt, generate_on
from gpt_jax.sample.settings import Settings, changed
from gpt_jax.tokenizer.chat_template import checked
from gpt_jax.tokenizer.tokenizer import Tokenizer


class Model:
    """A model on this machine's first device, with its tokenizer. It continues texts, answers messages, and scores.

    The functions of `gpt_jax.model` and `gpt_jax.sample` take its attributes model, params and tokenizer.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model: GPT = loaded.model
        self.params: Params = loaded.params
        self.tokenizer: Tokenizer = loaded.tokenizer
        self._last_engine: Engine | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture, and how it runs on this machine."""
        return self.model.config

    @functools.cached_property
    def _decoding_params(self) -> Params:
        return prepare_params(self.params, self.config)

    def _engine(self, n_rows: int) -> Engine:
        """An engine for so many texts at the same time. The last one is kept, with what it has read."""
        n_slots = bucket(n_rows, MOST_SLOTS, 1)
        if self._last_engine is None or self._last_engine.n_slots != n_slots:
            self._last_engine = None  # Its memory is free before the other's is taken.
            params, n_tokens = self._decoding_params, self.tokenizer.vocab_size
            self._last_engine = Engine(self.model, params, n_slots, n_tokens=n_tokens, chunks_a_turn=ALL_CHUNKS)
        return self._last_engine

    @overload
    def generate(self, prompts: str, **settings: Any) -> Result: ...
    @overload
    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Result]: ...

    @own_numerics()
    def generate(self, prompts: str | Sequence[str], **settings: Any) -> Result | list[Result]:
        """The continuation of a prompt, or of each of several: text, tokens and their log-probabilities.

        settings: the fields of `Settings` and `Filters` in `sample.settings`: max_new_tokens, seed, stop, stop_ids,
        alternatives; temperature, top_k, top_p, min_p, the penalties and logit_bias. Raises UserError for an impossible
        value, and for a prompt that is longer than the context.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        chosen, T = changed(Settings(), settings), self.config.context_length
        tokens = [encode_prompt(text, self.tokenizer, T) for text in texts]
        results = generate_on(self._engine(len(texts)), self.tokenizer, tokens, chosen) if texts else []
        return results[0] if isinstance(prompts, str) else results

    @own_numerics()
    def chat(self, messages: str | Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """The answer to the last message of a conversation, or to one question.

        messages: each has a "role" (system, user, assistant) and a "content", a text or OpenAI's list of text parts.
        settings: as in `generate`. Raises UserError when the tokenizer has no chat template, for messages of another
        form, and when the conversation leaves no room for an answer.
        """
        history = checked([message("user", messages)] if isinstance(messages, str) else messages, plain=str)
        system = history.pop(0)["content"] if history and history[0]["role"] == "system" else None
        chosen = changed(Settings(), settings)
        _, prompt = fit(self.tokenizer, system, history, self.config.context_length, chosen.max_new_tokens)
        [result] = generate_on(self._engine(1), self.tokenizer, [prompt], chosen)
        return result.text.strip()

    @own_numerics()
    def score(self, texts: str | Sequence[str], stride: int = 0) -> Tally:
        """The loss on a text, or on several, each on its own: nats a token, perplexity, bits.

        stride: tokens from one window to the next when a text is longer than the context; 0: the context's length.
        Raises UserError when there is no text.
        """
        T = self.config.context_length
        scorer = Scorer(self.model, self.params, Placement(runtime.local_devices()[:1]), batch_size=1)
        blocks = [Block(text.encode(), True, 0) for text in ([texts] if isinstance(texts, str) else texts)]
        return evaluate_blocks(scorer, blocks, self.tokenizer, T, stride or T)

    @own_numerics()
    def logits(self, text: str | Sequence[int]) -> np.ndarray:
        """The logits after each token of a text, or of token ids: float32 (T, V), V the tokenizer's vocabulary.

        Raises UserError when there are no tokens, or more than the context has room for, or ids that the model does
        not know.
        """
        T = self.config.context_length
        tokens = encode_prompt(text, self.tokenizer, T) if isinstance(text, str) else list(text)
        if not 0 < len(tokens) <= T:
            raise UserError(f"there are {len(tokens)} tokens, and the model reads 1 to {T} at one time")
        check_known(tokens, self.model, self.tokenizer)
        plain = GPT(dataclasses.replace(self.config, attention="xla"))  # "xla" takes any length.
        hidden_BTD = jax.jit(forward, static_argnums=0)(plain, self.params, np.array([tokens], np.int32))
        return np.asarray(logits_NV(plain, self.params, hidden_BTD[0]))[:, : self.tokenizer.vocab_size]


@own_numerics()
def load_named(
    name: str | Path, checkpoint: str = "latest", context_length: int = 0, quantize: QuantizeName = "none"
) -> Model:
    """The model of a run, or a published one: a folder, a .gguf file, or a name on the hub. See `gpt_jax.load`."""
    if quantize not in get_args(QuantizeName):
        raise UserError(f"quantize = {quantize!r} must be one of {', '.join(get_args(QuantizeName))}")
    runtime.setup_once()
    return Model(load_model(open_source(str(name), checkpoint), context_length, quantize=quantize))
