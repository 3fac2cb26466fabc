"""What every request goes through before it is answered, and every answer after: who may ask, from where, how much, and
what the log says of it. Plain ASGI, so that nothing stands between an answer and the client's leaving."""

import asyncio
import contextlib
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_jax.errors import TooLongError, UserError
from gpt_jax.sample.scheduler import QueueFullError
from gpt_jax.serve.protocol import ErrorResponse, Problem
from gpt_jax.serve.worker import EngineError, StoppedError

Result = TypeVar("Result")

LONGEST_BODY = 8 * 2**20
"""Bytes of a request's body at most: a context of a million tokens fits."""

BODY_SECONDS = 30.0
"""Time for a body to come."""

STALLED_SECONDS = 60.0
"""Time after which a client that does not take what it is sent is given up."""

RETRY_AFTER = 2
"""Seconds after which to come again when the queue is full."""

OPEN_PATHS = ("/", "/health", "/openapi.json", "/favicon.ico")
"""Those that need no key."""

PROBES = ("/health", "/metrics")
"""Those that are asked all the time, and are not in the log."""

LEFT = 499
"""The status in the log of a client that has left, as nginx has it."""


class ApiError(Exception):
    """An error that the client is told, with OpenAI's fields."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {**(headers or {}), **({"retry-after": str(retry_after)} if retry_after else {})}

    def body(self) -> str:
        """The error as JSON."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        problem = Problem(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=problem).model_dump_json()

    def response(self) -> Response:
        """The error as a whole answer."""
        headers = {**self.headers, **({"www-authenticate": "Bearer"} if self.status == 401 else {})}
        return Response(self.body(), self.status, headers, "application/json")


def explained(error: Exception) -> ApiError:
    """What the client is told of an error. That of a bug is printed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=RETRY_AFTER)
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="context_length_exceeded" if isinstance(error, TooLongError) else None)
    if isinstance(error, StoppedError):
        return ApiError(503, "the server was told to stop", code="stopped")
    if isinstance(error, EngineError):
        return ApiError(500, f"the engine failed: {error}", code="engine_failed")
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_context=False, include_input=False)
        # Where a value may be of several types, the error is of the one that fits best.
        own = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
        first = next((one for one in own if not one["type"].endswith("_type")), own[0])
        where = ".".join(str(part) for part in first["loc"] if not is_type(part))
        return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], where or None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    traceback.print_exception(error)
    return ApiError(500, f"{type(error).__name__} in the server")


def is_type(part: int | str) -> bool:
    """True for a part of a place that pydantic adds to tell types apart, of which clients know nothing."""
    return isinstance(part, str) and re.search(r"[\[(]|^(constrained-)?(str|int|float|bool|dict)$", part) is not None


@dataclass
class Entry:
    """What the log says of a request; handlers add to `facts`, and to `texts`, which are left out unless asked for."""

    id: str
    facts: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """Who may ask."""

    keys: Sequence[str] = ()  # Any of them; none: everybody.
    hosts: Collection[str] = ()  # Names by which the server may be called; none: any.
    origins: Collection[str] = ()  # Other servers whose pages may ask; *: any.
    log_texts: bool = False

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError for a request that is not to be answered."""
        host = headers.get("host", "")
        if self.hosts and re.sub(r":\d+$", "", host).lower() not in self.hosts:
            # A page of elsewhere can have its own name mean this machine.
            raise ApiError(403, f"this server is not called {host!r:.100}", code="wrong_host")
        origin = headers.get("origin")
        if origin and not {origin, "*"} & set(self.origins) and origin.partition("://")[2] != host:
            raise ApiError(403, f"pages of {origin!r:.100} may not ask; see --cors-origin", code="wrong_origin")
        if self.keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            given = headers.get("authorization", "").partition(" ")[2].strip().encode()
            fits = [hmac.compare_digest(key.encode(), given) for key in self.keys]  # All, whichever it is.
            if not any(fits):
                raise ApiError(
                    401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )


class Gate:
    """The application, within all that."""

    def __init__(
        self, app: ASGIApp, rules: Rules, ended: Callable[[str, int], None], log: Callable[[str], None] | None = None
    ) -> None:
        """ended: is told the path and the status of each request. log: takes a line of JSON each."""
        self.app, self.rules, self.ended = app, rules, ended
        self.log = log or (lambda line: print(line, file=sys.stderr, flush=True))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        entry = Entry(given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex)
        scope["entry"] = entry
        status, began = 0, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["x-request-id"] = entry.id
                own["x-content-type-options"] = "nosniff"
                own.setdefault("cache-control", "no-store")
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            self.rules.check(scope, headers)
            scope["app"] = self  # By which the router raises what else it would answer.
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            status = LEFT
        except asyncio.CancelledError:
            status = LEFT
            raise
        except Exception as e:
            if status:  # It cannot be taken back: the connection ends in its midst.
                raise
            with contextlib.suppress(ClientDisconnect):
                await explained(e).response()(scope, receive, sending)
        finally:
            self.ended(scope["path"], status)
            facts = {"path": scope["path"], "status": status, "seconds": round(time.monotonic() - began, 4)}
            texts = entry.texts if self.rules.log_texts else {}
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = {"time": when, "id": entry.id, "method": scope["method"], **facts, **entry.facts, **texts}
            if scope["path"] not in PROBES:
                self.log(json.dumps(line, ensure_ascii=False))


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError when it is too long, or does not come."""
    too_long = ApiError(413, f"the body has more than {LONGEST_BODY:,} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > LONGEST_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LONGEST_BODY:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)


async def while_here(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns, unless the client leaves before: then it is cancelled. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return cast(Result, tasks[0].result())
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


ONE_LINE = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})
"""The characters at which Python and others end a line, and that JSON need not escape."""


class Events:
    """An answer by server-sent events, which ends early when the client leaves."""

    def __init__(
        self, write: Callable[[Callable[[str], Awaitable[None]]], Coroutine[Any, Any, None]], end: Callable[[], None]
    ) -> None:
        """write: writes all events, each by a call of the function that it is given with a line of JSON. end: is called
        at the end, however it comes."""
        self.write, self.end = write, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def event(data: str) -> None:
            body = f"data: {data.translate(ONE_LINE)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await while_here(receive, self.write(event))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.end()
