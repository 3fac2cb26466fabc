"""Servers of tiny models, each in a thread of the tests' process, and clients that speak plain HTTP with them."""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from gpt_jax.model.gpt import GPT
from gpt_jax.sample.engine import Engine
from gpt_jax.serve.answers import Served
from gpt_jax.serve.gate import Rules
from gpt_jax.serve.http import Service
from gpt_jax.serve.server import listen, serve
from gpt_jax.serve.worker import Worker
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests import tiny

CHAT = ByteTokenizer().with_chat_template(TEMPLATE)

OPEN = Rules()

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock"}},
]

HELLO = [{"role": "user", "content": "Hello, who are you?"}]


@dataclasses.dataclass
class Running:
    """A server that runs, and what it is made of."""

    url: str
    service: Service
    log: list[dict[str, Any]]

    @property
    def engine(self) -> Engine:
        """Its engine."""
        engine = self.service.worker.engine
        assert isinstance(engine, Engine)
        return engine

    def post(self, path: str, status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> Any:
        """The answer to a request, as JSON; its status is checked."""
        answer = httpx.post(self.url + path, json=body, timeout=120, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a streamed answer, without the last, which is [DONE]."""
        answer = httpx.post(self.url + path, json={**body, "stream": True}, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        *lines, done = answer.text.splitlines()[::2]
        assert (done, answer.text[-2:]) == ("data: [DONE]", "\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def wait_until_idle(self) -> None:
        """Waits for the engine to have nothing to do."""
        deadline = time.monotonic() + 60
        while not self.engine.is_idle or self.engine.tasks or self.service.worker.writing:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def tiny_engine(n_slots: int = 4, context_length: int = 256, prefix_bytes: int = 2**20, **options: Any) -> Engine:
    """An engine of a Llama with random weights, for the byte tokenizer."""
    config = dataclasses.replace(tiny.LLAMA, context_length=context_length)
    engine = Engine(GPT(config), tiny.uneven_params(config), n_slots, prefix_bytes=prefix_bytes, **options)
    engine.reserve(context_length)
    return engine


@contextmanager
def serving(
    engine: Engine,
    tokenizer: Tokenizer = CHAT,
    names: Sequence[str] = ("tiny",),
    rules: Rules = OPEN,
    grace: int = 5,
) -> Iterator[Running]:
    """A server, which is ready, until the end of the block; then nothing of it is left."""
    worker = Worker(engine)
    with running(Service(worker, [Served(name, tokenizer, worker) for name in names], rules), grace) as server:
        yield server


@contextmanager
def running(service: Service, grace: int = 5) -> Iterator[Running]:
    """`serving`, of a service that stands."""
    worker, log = service.worker, list[dict[str, Any]]()
    service.log = lambda line: log.append(json.loads(line))
    bound, ready, stop = listen("127.0.0.1", 0), threading.Event(), threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(serve(service, bound, grace, lambda _: ready.set()))
        await asyncio.to_thread(stop.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(300)
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", service, log)
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        assert not worker.thread.is_alive()
