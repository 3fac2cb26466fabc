"""Generation of text: batches of prompts, stop strings, streaming, texts longer than the context."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt_jax.errors import TooLongError, UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.sample.constraint import Constraint
from gpt_jax.sample.engine import ALL_CHUNKS, Engine, Progress, Request
from gpt_jax.sample.replicas import Replicas
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer

MOST_SLOTS = 64
"""Sequences that `generate` decodes at the same time, at most."""


@dataclass
class Result:
    """The text generated from one prompt, and all tokens that were drawn, the one that ended the text included.

    logprobs are those of the tokens under the model, in nats, before temperature and filters; drawn_logprobs those
    under the distribution that they were drawn from. alternatives: for each token the most probable ones with their
    log-probabilities under the model, as many as the settings ask for. finish_reason says why the text ended: "length",
    "end_of_text" (any of the stop ids), "stop", or "constraint", which the row's error explains.
    """

    prompt_tokens: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = ""


class Row:
    """One sequence during generation. Takes tokens, and returns text as soon as it is certain.

    sample: its number among those of the same prompt and seed. adapter: see Request. constraint: makes what says which
    tokens may be drawn; None: any may. Each request has one of its own, which takes the tokens that were drawn earlier,
    so that a request that was lost is made again as it was.
    """

    def __init__(
        self,
        prompt_tokens: Sequence[int],
        tokenizer: Tokenizer,
        settings: Settings,
        sample: int = 0,
        adapter: int = 0,
        constraint: Callable[[], Constraint] | None = None,
    ) -> None:
        self.result, self.adapter = Result(list(prompt_tokens)), adapter
        self.constraint = constraint
        self.error: Exception | None = None  # The constraint's, see Progress.
        self.settings, self.stop_ids = settings, tokenizer.stop_ids | set(settings.stop_ids)
        self.decoder = tokenizer.decoder(after=self.result.prompt_tokens)
        self.held = ""  # Decoded text that may be the start of a stop string.
        self.window_start = 0  # The first token that the model still sees.
        prompt = np.array(self.result.prompt_tokens, np.int32)
        self.seed = settings.seed, zlib.crc32(prompt.tobytes()), sample

    def request(self, context_length: int) -> Request:
        """What is asked of the engine: to go on as far as the context has room. When the tokens exceed the context, it
        restarts with its last half."""
        result, settings = self.result, self.settings
        tokens = result.prompt_tokens + result.tokens
        if len(tokens) - self.window_start > context_length:
            self.window_start = len(tokens) - max(1, context_length // 2)
        room = context_length + 1 - (len(tokens) - self.window_start)
        constraint = None
        if self.constraint is not None:
            constraint = self.constraint()
            for token in result.tokens:
                constraint.take(token)
        return Request(
            tokens,
            min(settings.max_new_tokens - len(result.tokens), room),
            settings.filters,
            self.stop_ids,
            self.seed,
            len(result.prompt_tokens),
            self.window_start,
            settings.alternatives,
            adapter=self.adapter,
            constraint=constraint,
        )

    def take(self, progress: Progress) -> Iterator[str]:
        """Takes the next tokens, as far as they belong to the text, and yields the text that is certain with each."""
        for i, (token, logprob) in enumerate(zip(progress.tokens, progress.logprobs, strict=True)):
            if self.result.finish_reason:
                break
            self.result.drawn_logprobs.append(progress.drawn_logprobs[i])
            self.result.alternatives += progress.alternatives[i : i + 1]
            yield self.add(token, logprob)
        self.error = progress.error
        if self.error and not self.result.finish_reason:
            yield self.finish("constraint")

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
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if token in self.stop_ids:
            return self.finish("end_of_text")
        self.held += self.decoder.push(token)
        uncertain = 0
        if self.settings.stop:
            text = self.held + self.decoder.held()
            cut = min((i for i in (text.find(s) for s in self.settings.stop) if i >= 0), default=-1)
            if cut >= 0:
                self.held = text[:cut]
                return self.finish("stop", flush=False)
            uncertain = longest_overlap(self.held, self.settings.stop)
        if len(result.tokens) == self.settings.max_new_tokens:
            return self.finish("length")
        return self.release(len(self.held) - uncertain)

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
    n_slots = max(1, min(len(prompts) * num_samples, MOST_SLOTS))
    engine = Engine(model, params, n_slots, n_tokens=tokenizer.vocab_size, chunks_a_turn=ALL_CHUNKS)
    return generate_on(engine, tokenizer, prompts, settings, num_samples, on_text)


def generate_on(
    engine: Engine | Replicas,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    num_samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """`generate_tokens` on an engine that has nothing else to do, and keeps what it reads for the next time."""
    for prompt in prompts:
        check_known(prompt, engine.model, tokenizer)
    rows = [Row(prompt, tokenizer, settings, n) for prompt in prompts for n in range(num_samples)]
    T = engine.model.config.context_length
    engine.reserve(max((row.request(T).places for row in rows), default=0))  # At once, not bit by bit.
    for _ in write(engine, rows, on_text):
        pass
    return [row.result for row in rows]


def write(
    engine: Engine | Replicas, rows: Iterable[Row], on_text: Callable[[int, str], None] | None = None
) -> Iterator[tuple[int, Row]]:
    """Lets an engine that has nothing else to do write all rows, which are taken as slots become free. Yields each row
    that has ended, with its number, as soon as it has; when the caller stops early, the others are cancelled. on_text:
    as in `generate`."""
    T = engine.model.config.context_length
    writing: dict[int, tuple[int, Row]] = {}  # By the number of the request.
    coming = enumerate(rows)
    try:
        while True:
            for number, row in itertools.islice(coming, max(0, 2 * engine.n_slots - len(writing))):
                writing[engine.submit(row.request(T))] = number, row
            if not writing:
                return
            for progress in engine.turn():
                if progress.id not in writing:
                    continue
                number, row = writing[progress.id]
                for text in row.take(progress):
                    if text and on_text:
                        on_text(number, text)
                if row.result.finish_reason:
                    engine.cancel(progress.id)
                if row.result.finish_reason or progress.finish_reason:
                    del writing[progress.id]
                if row.result.finish_reason:
                    yield number, row
                elif progress.finish_reason:  # The context is full.
                    writing[engine.submit(row.request(T))] = number, row
    finally:
        for id in writing:
            engine.cancel(id)


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
        raise TooLongError(
            f"the prompt has {len(tokens)} tokens, and the model's context_length is {context_length}; shorten it"
        )
    return tokens
