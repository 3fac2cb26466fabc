"""The paths of the server: what each reads, and how it is answered."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gpt_jax.serve import protocol as p
from gpt_jax.serve.answers import Chatting, Completing, Job, Served, chat_job, completion_job, echoes
from gpt_jax.serve.gate import ApiError, Events, Gate, Rules, explained, read_body, while_here
from gpt_jax.serve.metrics import Metrics
from gpt_jax.serve.openapi import document
from gpt_jax.serve.worker import Worker
from gpt_jax.tokenizer.tokenizer import NO_CHAT

Asked = TypeVar("Asked", bound=p.Asked)

PAGE = Path(__file__).with_name("page.html")


class Service:
    """The models that are served, of which the first answers requests that name none."""

    def __init__(
        self, worker: Worker, served: Sequence[Served], rules: Rules, log: Callable[[str], None] | None = None
    ) -> None:
        """log: takes a line of JSON a request; None: standard error."""
        self.worker, self.rules, self.log = worker, rules, log
        self.served = {one.name: one for one in served}
        self.first = served[0]
        self.metrics = Metrics(worker.engine)
        self.is_stopping = False
        self.page, self.policy = page()

    def application(self) -> ASGIApp:
        """The ASGI application."""
        paths: list[tuple[str, str, Callable[[Request], Awaitable[Any]]]] = [
            ("/", "GET", self.chat_page),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.show_metrics),
            ("/openapi.json", "GET", self.openapi),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/v1/completions", "POST", self.complete),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/embeddings", "POST", self.embed),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
            ("/tokenizer_info", "GET", self.tokenizer_info),
        ]
        app: ASGIApp = Router([Route(path, answer, methods=[method]) for path, method, answer in paths])
        if self.rules.origins:
            app = CORSMiddleware(app, allow_origins=self.rules.origins, allow_methods=["*"], allow_headers=["*"])
        return Gate(app, self.rules, self.ended, self.log)

    def stop(self) -> None:
        """Refuses what is asked from now on."""
        self.is_stopping = True

    def ended(self, path: str, status: int) -> None:
        """Counts a request."""
        known = path if re.fullmatch(r"/(v1/)?[a-z_/]{0,30}", path) and status != 404 else "other"
        self.metrics.requests.labels(known, str(status)).inc()
        if status == 429:
            self.metrics.rejected.inc()

    async def chat_page(self, request: Request) -> Response:
        """The chat page."""
        headers = {"content-security-policy": self.policy, "referrer-policy": "no-referrer"}
        return Response(self.page, 200, headers, "text/html; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        worker = self.worker
        status = (
            "failed" if worker.failure else "stopping" if self.is_stopping else "ok" if worker.is_ready else "loading"
        )
        return said(p.Health.model_validate({"status": status}), 200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' page."""
        return Response(self.metrics.text(), 200, None, "text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI file."""
        found = document(version("gpt-jax"), bool(self.rules.keys))
        return Response(json.dumps(found), 200, None, "application/json")

    async def models(self, request: Request) -> Response:
        """All models."""
        return said(p.ModelList(object="list", data=[one.card() for one in self.served.values()]))

    async def model(self, request: Request) -> Response:
        """One model."""
        return said(self.named(request.path_params["name"]).card())

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm_eval asks of the first model's tokenizer."""
        tokenizer = self.first.tokenizer
        begin = None if tokenizer.begin_of_text is None else tokenizer.decode([tokenizer.begin_of_text])
        end = tokenizer.decode([tokenizer.end_of_text])
        info = p.TokenizerInfo(eos_token=end, bos_token=begin, pad_token=end, chat_template=tokenizer.chat_template)
        return said(info)

    async def tokenize(self, request: Request) -> Response:
        """Tokens. A text that is the name of a special token is that token; in any other, names are plain text."""
        asked = await self.asked(request, p.TokenizeRequest)
        served = self.named(asked.model)
        tokenizer = served.tokenizer
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if asked.messages is not None:
            self.must_chat(served)
            tokens = tokenizer.encode_chat(asked.messages)
        else:
            text = asked.prompt or ""
            special = tokenizer.special_tokens.get(text)
            begin = [tokenizer.begin_of_text] if asked.add_special_tokens else []
            own = [special] if special is not None else tokenizer.encode(text)
            tokens = [*(token for token in begin if token is not None), *own]
        return said(p.Tokens(tokens=tokens, count=len(tokens), max_model_len=served.context_length))

    async def detokenize(self, request: Request) -> Response:
        """Text."""
        asked = await self.asked(request, p.DetokenizeRequest)
        served = self.named(asked.model)
        for i, token in enumerate(asked.tokens):
            if token >= served.tokenizer.vocab_size:
                raise ApiError(400, f"there is no token {token}", f"tokens.{i}")
        return said(p.Text(prompt=served.tokenizer.decode(asked.tokens)))

    async def embed(self, request: Request) -> Response:
        """The mean of each text's last hidden states."""
        asked = await self.asked(request, p.EmbeddingRequest)
        served = self.named(asked.model)
        prompts = served.prompts(asked.input)

        async def embedded() -> list[p.Embedding]:
            return [await one(i, tokens) for i, tokens in enumerate(prompts)]

        async def one(i: int, tokens: list[int]) -> p.Embedding:
            mean_D = np.mean((await self.worker.score(tokens, served.adapter)).hidden_TD, axis=0, dtype=np.float32)
            if asked.encoding_format == "base64":
                coded: Any = base64.b64encode(mean_D.astype("<f4").tobytes()).decode()
            else:
                coded = mean_D.tolist()
            return p.Embedding(object="embedding", index=i, embedding=coded)

        data = await while_here(request.receive, embedded())
        n = sum(map(len, prompts))
        usage = p.Usage(prompt_tokens=n, total_tokens=n)
        request.scope["entry"].facts |= {"model": served.name, "prompt_tokens": n}
        return said(p.Embeddings(object="list", model=served.name, data=data, usage=usage))

    async def complete(self, request: Request) -> Any:
        """Goes on with texts."""
        asked = await self.asked(request, p.CompletionRequest)
        served = self.named(asked.model)
        if not asked.max_tokens and not asked.echo:
            raise ApiError(400, "max_tokens: 0 goes with echo only", "max_tokens")
        job = completion_job(served, asked, self.client(request))
        beginnings = await while_here(request.receive, echoes(job, asked))
        return await self.answer(request, asked, job, Completing(job, asked, beginnings))

    async def chat(self, request: Request) -> Any:
        """Answers a conversation."""
        asked = await self.asked(request, p.ChatRequest)
        served = self.named(asked.model)
        self.must_chat(served)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        job = await while_here(request.receive, chat_job(served, asked, self.client(request)))
        return await self.answer(request, asked, job, Chatting(job, asked))

    async def answer(self, request: Request, asked: p.Generation, job: Job, maker: Completing | Chatting) -> Any:
        """Lets the engine work, and answers with all of it, or by events."""
        entry = request.scope["entry"]
        entry.facts["model"] = job.served.name
        entry.texts["request"] = asked.model_dump(exclude_unset=True, mode="json")
        timer = Timer(self.metrics, job)
        has_work = not isinstance(asked, p.CompletionRequest) or asked.max_tokens > 0

        async def accept() -> None:
            if has_work:
                self.worker.submit(job.work)
                await job.work.accepted()

        def end() -> None:
            self.worker.cancel(job.work)
            usage = job.usage()
            entry.facts |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            entry.facts |= {"cached_tokens": sum(job.reused.values()), **timer.facts()}
            entry.texts["answers"] = [row.result.text for row in job.work.rows]

        try:
            await while_here(request.receive, accept())
            whole = None if asked.stream else await while_here(request.receive, maker.whole())
        except BaseException:
            end()
            raise
        if whole is not None:
            end()
            return said(whole)

        async def write(event: Callable[[str], Awaitable[None]]) -> None:
            try:
                async with aclosing(maker.chunks()) as chunks:
                    async for chunk in chunks:
                        await event(chunk.model_dump_json(exclude_unset=True))
            except ClientDisconnect:
                raise
            except Exception as e:
                await event(explained(e).body())
            await event("[DONE]")

        return Events(write, end)

    async def asked(self, request: Request, kind: type[Asked]) -> Asked:
        """The body of a request. Raises ApiError where it is too long, or the server not ready, and what pydantic
        raises where it is of another form."""
        body = await read_body(request)
        if self.is_stopping or not self.worker.is_ready or self.worker.failure:
            raise ApiError(
                503, "the server is stopping" if self.is_stopping else "the server is not ready yet", retry_after=5
            )
        asked = kind.model_validate_json(body)
        refuse_unknown(asked)
        return asked

    def named(self, name: str | None) -> Served:
        """The model of that name, or the first. Raises ApiError."""
        if name is None:
            return self.first
        if name not in self.served:
            names = ", ".join(self.served)
            raise ApiError(404, f"there is no model {name!r:.100}; there are: {names}", "model", "model_not_found")
        return self.served[name]

    def must_chat(self, served: Served) -> None:
        """Raises ApiError where a model has no chat template."""
        if served.tokenizer.chat_template is None:
            raise ApiError(400, f"{served.name}: {NO_CHAT}; /v1/completions works", "model", "no_chat_template")

    def client(self, request: Request) -> str:
        """Who asks, for the engine's turns: a key, or else an address."""
        key = request.headers.get("authorization", "")
        return hashlib.sha256(key.encode()).hexdigest() if key else request.client.host if request.client else ""


class Timer:
    """Times of a job's tokens, for the metrics and the log."""

    def __init__(self, metrics: Metrics, job: Job) -> None:
        self.metrics, self.began, self.first, self.last, self.n_first, self.n = (
            metrics,
            time.monotonic(),
            0.0,
            0.0,
            0,
            0,
        )
        job.watch = self.saw

    def saw(self, n: int) -> None:
        """Notes that so many tokens have come."""
        self.last = time.monotonic()
        self.n += n
        if not self.first:
            self.first, self.n_first = self.last, n
            self.metrics.first.observe(self.first - self.began)

    def facts(self) -> dict[str, float]:
        """For the log: seconds to the first token, and of each one after it."""
        if not self.first:
            return {}
        found = {"first_token_seconds": round(self.first - self.began, 4)}
        if self.n > self.n_first:
            each = (self.last - self.first) / (self.n - self.n_first)
            self.metrics.each.observe(each)
            found["token_seconds"] = round(each, 5)
        return found


def said(answer: BaseModel, status: int = 200) -> Response:
    """An answer as JSON."""
    return Response(answer.model_dump_json(exclude_unset=True), status, None, "application/json")


def refuse_unknown(asked: Any, where: str = "") -> None:
    """Raises ApiError naming a field that this server does not know, at any depth, unless it is null."""
    if isinstance(asked, p.Asked):
        for name, value in (asked.model_extra or {}).items():
            if value is not None:
                known = ", ".join(type(asked).model_fields)
                raise ApiError(
                    400, f"{where}{name} is not supported; there are: {known}", f"{where}{name}", "unknown_field"
                )
        for name in type(asked).model_fields:
            refuse_unknown(getattr(asked, name), f"{where}{name}.")


def page() -> tuple[bytes, str]:
    """The chat page, and the policy by which a browser runs its script, and uses its style, and no other."""
    content = PAGE.read_bytes()

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in found)

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
    policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return content, policy
