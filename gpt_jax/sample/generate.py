"""Generation of text: batches of prompts, stop strings, streaming, texts longer than the context."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.sample.decode import CHUNK, bucket, decoder_for, prepare_params
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Result:
    """The text generated from one prompt, and its tokens.

    logprobs are those of the tokens under the model, in nats, before temperature and filters. finish_reason says why
    the text ended: "length", "end_of_text" (any of the tokenizer's stop_ids) or "stop".
    """

    prompt_tokens: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


class Row:
    """One sequence during generation. Takes tokens, and returns text as soon as it is certain."""

    def __init__(self, prompt_tokens: list[int], tokenizer: Tokenizer, settings: Settings) -> None:
        self.result = Result(prompt_tokens)
        self.settings, self.stop_ids = settings, tokenizer.stop_ids
        self.decoder = tokenizer.decoder(after=prompt_tokens)
        self.held = ""  # Decoded text that may be the start of a stop string.
        self.window_start = 0  # The first token that the model still sees.

    @property
    def tokens(self) -> list[int]:
        """The tokens of the prompt and the answer."""
        return self.result.prompt_tokens + self.result.tokens

    def window(self, context_length: int) -> list[int]:
        """The tokens for the model to read. When they exceed the context, the window restarts with its last half."""
        if len(self.tokens) - self.window_start > context_length:
            self.window_start = len(self.tokens) - max(1, context_length // 2)
        return self.tokens[self.window_start :]

    def add(self, token: int, logprob: float) -> str:
        """Takes the next token and returns the text that is now certain. Does nothing once the row has ended.

        The row ends at the first token with which its text contains a stop string, be it in the middle of the token, or
        in one that may still change since a character lacks bytes. As in llama.cpp, and unlike in transformers, a stop
        string that begins in the prompt is none. Raises UserError when the model's logits are not numbers.
        """
        result = self.result
        if result.finish_reason:
            return ""
        if not math.isfinite(logprob):
            raise UserError(f"the log-probability of a token is {logprob}: the model's weights are damaged")
        if token in self.stop_ids:
            return self.finish("end_of_text")
        result.tokens.append(token)
        result.logprobs.append(logprob)
        self.held += self.decoder.push(token)
        if self.settings.stop:
            text = self.held + self.decoder.held()
            cut = min((i for i in (text.find(s) for s in self.settings.stop) if i >= 0), default=-1)
            if cut >= 0:
                self.held = text[:cut]
                return self.finish("stop", flush=False)
        if len(result.tokens) == self.settings.max_new_tokens:
            return self.finish("length")
        certain = len(self.held) - longest_overlap(self.held, self.settings.stop)
        return self.release(certain)

    def release(self, n: int) -> str:
        """Moves the first n held characters to the result."""
        text, self.held = self.held[:n], self.held[n:]
        self.result.text += text
        return text

    def finish(self, reason: str, flush: bool = True) -> str:
        """Ends the row, and releases all held text."""
        self.result.finish_reason = reason
        if flush:
            self.held += self.decoder.flush()
        return self.release(len(self.held))


def longest_overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    lengths = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def generate(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: Settings,
    num_samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """Continues each prompt `num_samples` times: prompt 0's samples first, then prompt 1's, and so on.

    `on_text(row, text)` is called as text becomes certain; it never gets a part of a character. A row's result depends
    on its prompt, the settings and its number among the prompt's samples, not on the rest of the batch.

    An empty prompt stands for the start of a document. Texts may grow longer than the model's context: each time the
    context is full, the model goes on from its last half. Raises UserError when a prompt alone does not fit.
    """
    prompt_tokens = [encode_prompt(prompt, tokenizer, model.config.context_length) for prompt in prompts]
    return generate_tokens(model, params, tokenizer, prompt_tokens, settings, num_samples, on_text)


def generate_tokens(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    num_samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """Like `generate`, from token ids: at least one in each prompt, and no more than fit into the context.

    Raises UserError for ids that the model does not know.
    """
    for prompt in prompts:
        check_known(prompt, model, tokenizer)
    rows = [Row(list(prompt), tokenizer, settings) for prompt in prompts for _ in range(num_samples)]
    keys_B = row_keys(rows, settings.seed, num_samples)
    for tokens_B, logprobs_B in token_stream(model, params, tokenizer.vocab_size, rows, keys_B, settings):
        for i, row in enumerate(rows):
            text = row.add(int(tokens_B[i]), float(logprobs_B[i]))
            if text and on_text:
                on_text(i, text)
    return [row.result for row in rows]


def check_known(tokens: Sequence[int], model: GPT, tokenizer: Tokenizer) -> None:
    """Raises UserError when the model has no embeddings for some of the ids.

    A tokenizer may have such special tokens, as Gemma 3's has one for images. A chat template can ask for them.
    """
    known = model.config.vocab_size
    if unknown := [token for token in tokens if not 0 <= token < known]:
        names = [tokenizer.decode([i]) if 0 <= i < tokenizer.vocab_size else str(i) for i in unknown[:3]]
        raise UserError(f"the model knows {known} tokens, and {', '.join(names)} is none of them; leave it out")


def encode_prompt(prompt: str, tokenizer: Tokenizer, context_length: int) -> list[int]:
    """The tokens of a prompt, after `begin_of_text` if the tokenizer has one; `end_of_text` if these are none.

    Raises UserError when they do not fit into the context.
    """
    begin = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    tokens = [*begin, *tokenizer.encode(prompt)] or [tokenizer.end_of_text]
    if len(tokens) > context_length:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, and the model's context_length is {context_length}; shorten it"
        )
    return tokens


def row_keys(rows: list[Row], seed: int, num_samples: int) -> jax.Array:
    """A random key for each row, from the seed, its prompt and its number among the prompt's samples."""
    prompt_B = np.array([zlib.crc32(np.array(row.result.prompt_tokens, np.int32).tobytes()) for row in rows], np.uint32)
    sample_B = np.arange(len(rows), dtype=np.uint32) % num_samples
    key = jax.random.key(seed)
    return jax.vmap(lambda prompt, n: jax.random.fold_in(jax.random.fold_in(key, prompt), n))(prompt_B, sample_B)


def token_stream(
    model: GPT, params: Params, n_tokens: int, rows: list[Row], keys_B: jax.Array, settings: Settings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The next token of each row and its log-probability, int32 and float32 (B,), until all rows have ended.

    The caller adds the tokens to the rows, which are read again when the context is full and must be refilled.
    """
    decoder = decoder_for(model, settings.filters, n_tokens)
    params = prepare_params(params, model.config)
    drawn = 0
    while not all(row.result.finish_reason for row in rows):
        # A row that has ended takes part with one token, so that its length does not fill the context of the others.
        windows = [
            row.tokens[-1:] if row.result.finish_reason else row.window(model.config.context_length) for row in rows
        ]
        longest = max(map(len, windows))
        cache_length = bucket(longest + settings.max_new_tokens - drawn, model.config.context_length)
        tokens_BT = np.zeros((len(rows), bucket(longest, cache_length)), np.int32)
        for i, window in enumerate(windows):
            tokens_BT[i, : len(window)] = window
        length_B = np.array([len(window) for window in windows], np.int32)
        seen_BV = seen_tokens(model, rows, settings)
        state, logprobs_B = decoder.prefill(
            params, tokens_BT, length_B, drawn, keys_B, seen_BV, cache_length=cache_length
        )
        yield np.asarray(state.last_B), np.asarray(logprobs_B)
        drawn += 1

        filled = longest
        while filled < cache_length and not all(row.result.finish_reason for row in rows):
            n = min(CHUNK, cache_length - filled, settings.max_new_tokens - drawn)
            state, tokens_NB, logprobs_NB = decoder.decode(params, state, n)
            yield from zip(np.asarray(tokens_NB)[:n], np.asarray(logprobs_NB)[:n], strict=True)
            filled, drawn = filled + n, drawn + n


def seen_tokens(model: GPT, rows: list[Row], settings: Settings) -> np.ndarray | None:
    """The tokens that each row has seen, bool (B, V), for the repetition penalty; None without a penalty."""
    if settings.filters.repetition_penalty == 1:
        return None
    seen_BV = np.zeros((len(rows), model.config.embedding_rows), bool)
    for i, row in enumerate(rows):
        seen_BV[i, row.tokens] = True
    return seen_BV
