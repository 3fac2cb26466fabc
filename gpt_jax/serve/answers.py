"""From what a client asks to rows of the engine, and from what they draw to OpenAI's answers and chunks of them."""

import asyncio
import functools
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt_jax.errors import TooLongError, UserError
from gpt_jax.sample.decode import Scores
from gpt_jax.sample.engine import Request, check_request, fresh_seed
from gpt_jax.sample.generate import Row, check_known, encode_prompt
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.serve import protocol as p
from gpt_jax.serve.grammar import Grammar, Grammars
from gpt_jax.serve.tools import (
    Arguments,
    Call,
    Content,
    Format,
    ToolParser,
    check_tools,
    for_template,
    forced,
    format_of,
)
from gpt_jax.serve.worker import Piece, Work, Worker
from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model as clients know it."""

    name: str
    tokenizer: Tokenizer
    worker: Worker
    adapter: int = 0  # See Request.
    created: int = field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The grammars of answers."""
        return Grammars(self.tokenizer)

    @functools.cached_property
    def tool_format(self) -> Format | None:
        """How it calls tools, if it does."""
        return format_of(self.tokenizer.chat)

    @property
    def context_length(self) -> int:
        """The longest text, in tokens."""
        return self.worker.context_length

    def card(self) -> p.ModelCard:
        """What /v1/models says of it."""
        return p.ModelCard(
            id=self.name,
            object="model",
            created=self.created,
            owned_by="gpt_jax",
            chat=self.tokenizer.chat_template is not None,
            context_length=self.context_length,
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return encode_prompt(text, self.tokenizer, self.context_length)

    def prompts(self, given: Any) -> list[list[int]]:
        """The tokens of a text, of several, of tokens, or of several lists of those. A list without any is what a text
        without any is. Raises UserError."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        prompts = [self.encode(one) if isinstance(one, str) else list(one) or self.encode("") for one in given]
        for tokens in prompts:
            check_known(tokens, self.worker.engine.model, self.tokenizer)
        return prompts


def settings_of(asked: p.Generation, max_new_tokens: int, alternatives: int) -> Settings:
    """The settings that a client asks for. Raises UserError."""
    filters = Filters(
        temperature=asked.temperature,
        top_k=max(asked.top_k, 0),
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in asked.logit_bias.items()),
    )
    return Settings(
        max_new_tokens,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        stop_ids=tuple(asked.stop_token_ids),
        alternatives=alternatives,
        filters=filters,
    )


def row_of(
    served: Served,
    prompt: Sequence[int],
    settings: Settings,
    seed: int | None,
    sample: int,
    grammar: Grammar | None,
) -> Row:
    """The row of a prompt's answer. With a seed, it depends on that, on the prompt, and on the answer's number among
    those of the prompt; without one, on nothing that anybody knows."""
    row = Row(prompt, served.tokenizer, settings, sample, served.adapter, grammar)
    if seed is None:
        row.seed = fresh_seed()
    else:
        high, low = divmod(seed % 2**64, 2**32)
        row.seed = low, zlib.crc32(np.array(prompt, np.int32).tobytes()) ^ high, sample
    return row


@dataclass
class Job:
    """The answers that one request asks for: `n` to each prompt, the first prompt's first."""

    served: Served
    prompts: list[list[int]]
    n: int
    work: Work
    drawn: int = 0
    reused: dict[int, int] = field(default_factory=dict)  # By prompt: tokens that had been read before.
    watch: Callable[[int], None] = lambda n: None  # Is told of tokens as they come.

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces, as they come. Raises UserError and EngineError."""
        going_on = len(self.work.rows)
        while going_on:
            piece = await self.work.next()
            self.drawn += len(piece.tokens)
            self.watch(len(piece.tokens))
            prompt = piece.index // self.n
            self.reused[prompt] = min(self.reused.get(prompt, piece.reused_tokens), piece.reused_tokens)
            going_on -= bool(piece.finish_reason)
            yield piece

    def usage(self) -> p.Usage:
        """What was read and written so far."""
        read = sum(map(len, self.prompts))
        details = p.PromptDetails(cached_tokens=sum(self.reused.values()))
        return p.Usage(
            prompt_tokens=read,
            completion_tokens=self.drawn,
            total_tokens=read + self.drawn,
            prompt_tokens_details=details,
        )


def job_of(
    served: Served,
    prompts: list[list[int]],
    settings: Settings,
    asked: p.Generation,
    client: str,
    grammar: Grammar | None = None,
) -> Job:
    """A job that has not been submitted yet. Raises UserError where the engine would not take it: a row by itself would
    go on beyond the context, with the last half of it, which clients do not expect."""
    engine = served.worker.engine
    for prompt in prompts:
        check_request(
            Request(prompt, settings.max_new_tokens, settings.filters, settings.stop_ids), engine.model, engine.n_tokens
        )
    rows = [
        row_of(served, prompt, settings, asked.seed, sample, grammar) for prompt in prompts for sample in range(asked.n)
    ]
    return Job(served, prompts, asked.n, Work(rows, client))


def completion_job(served: Served, asked: p.CompletionRequest, client: str) -> Job:
    """The job of a completion. Raises UserError."""
    prompts = served.prompts(asked.prompt)
    settings = settings_of(asked, max(asked.max_tokens, 1), asked.logprobs or 0)
    return job_of(served, prompts, settings, asked, client)


async def chat_job(served: Served, asked: p.ChatRequest, client: str) -> Job:
    """The job of a chat. Raises UserError."""
    tools = asked.tools if asked.offers_tools else None
    grammar = await asyncio.to_thread(grammar_of, served, asked)
    prompt = served.tokenizer.chat.prompt(for_template(asked.messages, served.tool_format), tools)
    check_known(prompt, served.worker.engine.model, served.tokenizer)
    room = served.context_length + 1 - len(prompt)
    if room < 1:
        raise TooLongError(
            f"the conversation has {len(prompt)} tokens, and the model's context_length is {served.context_length}; "
            "shorten it"
        )
    most = asked.max_completion_tokens or asked.max_tokens or room
    settings = settings_of(asked, most, asked.top_logprobs or 0)
    return job_of(served, [prompt], settings, asked, client, grammar)


def grammar_of(served: Served, asked: p.ChatRequest) -> Grammar | None:
    """What the answers must be, if that is asked for. May take a second. Raises UserError."""
    format, of_tools = served.tool_format, None
    if asked.tools is not None:
        check_tools(asked.tools)
        if asked.offers_tools and format is None:
            raise UserError(f"tools: the chat template of {served.name} writes calls in no format that is known here")
    if format:
        parallel = asked.parallel_tool_calls is not False
        of_tools = forced(asked.tools or [], asked.tool_choice, format, served.grammars, parallel)
    if asked.response_format is None:
        return of_tools
    grammar = served.grammars.of_response(asked.response_format.model_dump(exclude_none=True))
    if grammar and asked.offers_tools:
        raise UserError("response_format goes with no tools: a call would not be of its form")
    return grammar or of_tools


FINISH: dict[str, p.FinishReason] = {"length": "length", "end_of_text": "stop", "stop": "stop"}
"""OpenAI's words for why a text ended."""


class Spelling:
    """Tokens as clients see them: one by one, as text and as bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return self.tokenizer.token_bytes[token]

    def text_of(self, token: int) -> str:
        """The same as text, in which bytes that are no whole character are U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def top(self, token: int, logprob: float) -> p.TopLogprob:
        """A token and its log-probability in a chat."""
        return p.TopLogprob(token=self.text_of(token), logprob=logprob, bytes=list(self.bytes_of(token)))

    def of_chat(self, piece: Piece, stop_ids: frozenset[int]) -> p.ChatLogprobs:
        """The log-probabilities of a piece's tokens, but for the one that ended the text."""
        content = []
        for i, token in enumerate(piece.tokens):
            if token not in stop_ids:
                tops = [self.top(*pair) for pair in (piece.alternatives[i] if piece.alternatives else ())]
                own = self.top(token, piece.logprobs[i])
                content.append(p.TokenLogprob(**dict(own), top_logprobs=tops))
        return p.ChatLogprobs(content=content)

    def of_completion(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        alternatives: Sequence[Sequence[tuple[int, float]] | None],
        offset: int,
    ) -> p.CompletionLogprobs:
        """The log-probabilities of tokens in a completion, of which the first begins at `offset` of the text."""
        texts = [self.text_of(token) for token in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops: list[dict[str, float] | None] = []
        for text, logprob, others in zip(texts, logprobs, alternatives, strict=True):
            if logprob is None or others is None:
                tops.append(None)
                continue
            named: dict[str, float] = {}
            for token, value in [*others]:  # Some tokens are spelt alike: the most probable one stands for them.
                named.setdefault(self.text_of(token), value)
            named.setdefault(text, logprob)
            tops.append(named)
        return p.CompletionLogprobs(tokens=texts, token_logprobs=list(logprobs), top_logprobs=tops, text_offset=offsets)


@dataclass
class Echo:
    """The prompt at the beginning of an answer, with its log-probabilities if they are wanted."""

    text: str
    logprobs: p.CompletionLogprobs | None


async def echoes(job: Job, asked: p.CompletionRequest) -> list[Echo]:
    """What answers begin with, a prompt each; empty texts without `echo`."""
    if not asked.echo:
        return [Echo("", None)] * len(job.prompts)
    found = []
    for i, tokens in enumerate(job.prompts):
        given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        text = given[i] if isinstance(given[0], str) else job.served.tokenizer.decode(tokens)
        logprobs = None
        if asked.logprobs is not None:
            scores = await job.served.worker.score(tokens, job.served.adapter)
            logprobs = prompt_logprobs(Spelling(job.served.tokenizer), tokens, scores, asked.logprobs)
        found.append(Echo(str(text), logprobs))
    return found


def prompt_logprobs(spelling: Spelling, tokens: Sequence[int], scores: Scores, n: int) -> p.CompletionLogprobs:
    """The log-probabilities of a prompt's tokens, of which the first has none."""
    alternatives: list[list[tuple[int, float]] | None] = [None]
    for ids, values in zip(scores.alternatives_TC[:-1, :n], scores.alternative_logprobs_TC[:-1, :n], strict=True):
        alternatives.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
    logprobs = [None, *np.asarray(scores.logprobs_T[:-1]).tolist()]
    return spelling.of_completion(tokens, logprobs, alternatives, 0)


class Completing:
    """A completion, as it comes."""

    def __init__(self, job: Job, asked: p.CompletionRequest, echoes: list[Echo]) -> None:
        self.job, self.asked, self.echoes = job, asked, echoes
        self.spelling = Spelling(job.served.tokenizer)
        self.offsets = [
            sum(map(len, echo.logprobs.tokens)) if echo.logprobs else len(echo.text)
            for echo in echoes
            for _ in range(job.n)
        ]
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.served.name,
        }

    def choice(self, piece: Piece) -> p.CompletionChoice:
        """What a piece adds to its text."""
        logprobs = None
        if self.asked.logprobs is not None:
            # With the one that ended the text: lm_eval takes the last of an echoed prompt's for the one that was drawn.
            alternatives = piece.alternatives or [[]] * len(piece.tokens)
            at = self.offsets[piece.index]
            logprobs = self.spelling.of_completion(piece.tokens, piece.logprobs, alternatives, at)
            self.offsets[piece.index] += sum(map(len, logprobs.tokens))
        reason = FINISH[piece.finish_reason] if piece.finish_reason else None
        return p.CompletionChoice(index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=reason)

    def beginnings(self) -> list[p.CompletionChoice]:
        """What the choices begin with, where the prompt is echoed."""
        reason: p.FinishReason | None = "length" if not self.asked.max_tokens else None
        echoed = [echo for echo in self.echoes for _ in range(self.job.n)]
        return [
            p.CompletionChoice(index=i, text=echo.text, logprobs=echo.logprobs, finish_reason=reason)
            for i, echo in enumerate(echoed)
        ]

    async def chunks(self) -> AsyncGenerator[p.Completion, None]:
        """The chunks of a stream. Raises UserError and EngineError."""
        includes = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        none: dict[str, Any] = {"usage": None} if includes else {}
        if self.asked.echo:
            for choice in self.beginnings():
                yield p.Completion(**self.head, choices=[choice], **none)
        if self.asked.max_tokens:
            async for piece in self.job.pieces():
                yield p.Completion(**self.head, choices=[self.choice(piece)], **none)
        if includes:
            yield p.Completion(**self.head, choices=[], usage=self.job.usage())

    async def whole(self) -> p.Completion:
        """The answer, once it is all there. Raises UserError and EngineError."""
        choices = self.beginnings()
        if self.asked.max_tokens:
            async for piece in self.job.pieces():
                choices[piece.index] = joined(choices[piece.index], self.choice(piece))
        return p.Completion(**self.head, choices=choices, usage=self.job.usage())


def joined(first: p.CompletionChoice, second: p.CompletionChoice) -> p.CompletionChoice:
    """Two parts of a choice as one."""
    logprobs = second.logprobs
    if first.logprobs and logprobs:
        one, two = dict(first.logprobs), dict(logprobs)
        logprobs = p.CompletionLogprobs(**{name: one[name] + two[name] for name in one})
    return p.CompletionChoice(
        index=first.index, text=first.text + second.text, logprobs=logprobs, finish_reason=second.finish_reason
    )


class Chatting:
    """The next message of a conversation, as it comes."""

    def __init__(self, job: Job, asked: p.ChatRequest) -> None:
        self.job, self.asked = job, asked
        self.spelling = Spelling(job.served.tokenizer)
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

        most = 1 if asked.parallel_tool_calls is False else None
        format = job.served.tool_format if asked.offers_tools else None
        self.parsers = [ToolParser(format, most=most) if format else None for _ in range(job.n)]
        self.calls: set[int] = set()  # The answers that call tools.

    def deltas(self, piece: Piece) -> list[p.ChatMessage]:
        """What a piece adds to its message."""
        parser = self.parsers[piece.index]
        if parser is None:
            return [p.ChatMessage(content=piece.text)] if piece.text else []
        found = []
        for part in [*parser.push(piece.text), *(parser.flush() if piece.finish_reason else ())]:
            match part:
                case Content(text):
                    found.append(p.ChatMessage(content=text))
                case Call(index, id, name):
                    self.calls.add(piece.index)
                    function = p.FunctionCall(name=name, arguments="")
                    call = p.ToolCall(index=index, id=id, type="function", function=function)
                    found.append(p.ChatMessage(tool_calls=[call]))
                case Arguments(index, text):
                    call = p.ToolCall(index=index, function=p.FunctionCall(arguments=text))
                    found.append(p.ChatMessage(tool_calls=[call]))
        return found

    def reason(self, piece: Piece) -> p.FinishReason:
        """Why the message of the last piece ended."""
        reason = FINISH[piece.finish_reason]
        return "tool_calls" if reason == "stop" and piece.index in self.calls else reason

    def logprobs(self, piece: Piece) -> p.ChatLogprobs | None:
        """The log-probabilities of a piece, if they are wanted."""
        if not self.asked.logprobs:
            return None
        return self.spelling.of_chat(piece, frozenset(self.job.work.rows[piece.index].stop_ids))

    async def chunks(self) -> AsyncGenerator[p.ChatChunk, None]:
        """The chunks of a stream: the roles, what is added, why each choice ended. Raises UserError and EngineError."""
        includes = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        none: dict[str, Any] = {"usage": None} if includes else {}
        head: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.job.served.name,
        }

        def chunk(index: int, delta: p.ChatMessage, logprobs: p.ChatLogprobs | None, reason: Any) -> p.ChatChunk:
            choice = p.ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
            return p.ChatChunk(**head, choices=[choice], **none)

        for index in range(self.job.n):
            yield chunk(index, p.ChatMessage(role="assistant", content=""), None, None)
        async for piece in self.job.pieces():
            logprobs, deltas = self.logprobs(piece), self.deltas(piece)
            if logprobs and logprobs.content and not deltas:  # Of text that is held back.
                deltas = [p.ChatMessage(content="")]
            for delta in deltas:
                yield chunk(piece.index, delta, logprobs, None)
                logprobs = None
            if piece.finish_reason:
                yield chunk(piece.index, p.ChatMessage(), None, self.reason(piece))
        if includes:
            yield p.ChatChunk(**head, choices=[], usage=self.job.usage())

    async def whole(self) -> p.ChatCompletion:
        """The answer, once it is all there. Raises UserError and EngineError."""
        messages = [p.ChatMessage(role="assistant", content="", refusal=None) for _ in range(self.job.n)]
        logprobs: list[list[p.TokenLogprob]] = [[] for _ in range(self.job.n)]
        reasons: list[p.FinishReason] = ["length"] * self.job.n
        async for piece in self.job.pieces():
            for delta in self.deltas(piece):
                add(messages[piece.index], delta)
            if found := self.logprobs(piece):
                logprobs[piece.index] += found.content
            if piece.finish_reason:
                reasons[piece.index] = self.reason(piece)
        choices = [
            p.ChatChoice(
                index=i,
                message=messages[i],
                logprobs=p.ChatLogprobs(content=logprobs[i]) if self.asked.logprobs else None,
                finish_reason=reasons[i],
            )
            for i in range(self.job.n)
        ]
        return p.ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.job.served.name,
            choices=choices,
            usage=self.job.usage(),
        )


def add(message: p.ChatMessage, delta: p.ChatMessage) -> None:
    """Adds to a message what a stream would."""
    if delta.content:
        message.content = (message.content or "") + delta.content
    for part in delta.tool_calls or ():
        calls = message.tool_calls or []
        if part.id:
            function = p.FunctionCall(name=part.function.name, arguments="")
            message.tool_calls = [*calls, p.ToolCall(id=part.id, type="function", function=function)]
            message.content = message.content or None
        else:
            calls[-1].function.arguments += part.function.arguments
