"""Many who ask at once, and in bad ways: the server answers the next request, and keeps nothing."""

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks

from tests import tiny
from tests.commands import wait_for
from tests.interop.models import publish
from tests.serve.processes import served
from tests.serve.servers import Running

SETTINGS = hypothesis.settings(
    max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


class Process:
    """A server's process, as the system sees it."""

    def __init__(self, pid: int, url: str) -> None:
        self.folder, self.url = Path(f"/proc/{pid}"), url
        self.expected = self.answer()

    @property
    def files(self) -> int:
        """How many files and sockets it has."""
        return len(list((self.folder / "fd").iterdir()))

    def status(self, name: str) -> int:
        """A number of /proc/PID/status; memory is in KiB."""
        lines = (self.folder / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

    def answer(self) -> Any:
        """What it answers."""
        body = {"prompt": [1, 2, 3], "max_tokens": 16, "temperature": 0, "logprobs": 2}
        answer = httpx.post(f"{self.url}v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def metric(self, name: str) -> float:
        """One of its metrics."""
        lines = httpx.get(f"{self.url}metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def wait_until_asked(self, texts: float) -> None:
        """Returns once so many texts have been asked of its engine."""
        wait_for(lambda: self.metric("gpt_jax_texts_total") == texts)

    @contextlib.contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """After the block nothing of it is left, and the same is answered as before."""
        files, threads = self.files, self.status("Threads")
        yield
        wait_for(lambda: self.metric("gpt_jax_busy_slots") == self.metric("gpt_jax_waiting_requests") == 0)
        wait_for(lambda: self.files <= files)
        assert self.status("Threads") <= threads
        assert self.answer() == self.expected


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("faults") / "small"
    publish(folder, tiny.LLAMA)
    with served("--model", folder, "--slots=4", "--queue=1000") as (server, url, _):
        yield Process(server.pid, url)


async def connections(url: httpx.URL, n: int, process: Process) -> None:
    """Opens so many, on each of which /health is asked, and which then stay open."""
    request = f"GET /health HTTP/1.1\r\nHost: {url.netloc.decode()}\r\n\r\n".encode()
    at_once = asyncio.Semaphore(100)

    async def open_one() -> asyncio.StreamWriter:
        async with at_once:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(request)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            return writer

    writers = await asyncio.gather(*(open_one() for _ in range(n)))
    assert process.files > n
    assert await asyncio.to_thread(process.answer) == process.expected
    for writer in writers:
        writer.close()


def test_ten_thousand_connections_that_stay_open(process: Process) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n = min(10_000, hard - 500)
    assert n >= 1000, f"the system allows {hard} open files, too few for this test"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with process.left_as_it_was():
            asyncio.run(connections(httpx.URL(process.url), n, process))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slow_reader(url: httpx.URL) -> socket.socket:
    """Who asks for 5 MB of events, which is more than the system keeps for it, and reads none of them."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.settimeout(120)
    client.connect((url.host, url.port))
    asked = {"prompt": [[1]] * 7, "n": 64, "max_tokens": 31, "stream": True, "logprobs": 20, "temperature": 2}
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


def test_slow_readers_hold_up_nobody(process: Process) -> None:
    """One of them leaves in the end, and the other gets its whole answer. Memory does not grow."""
    answered = 'gpt_jax_requests_total{path="/v1/completions",status="200"}'
    url, memory = httpx.URL(process.url), list[int]()
    for _ in range(2):
        with process.left_as_it_was():
            texts, requests = process.metric("gpt_jax_texts_total"), process.metric(answered)
            leaving, staying = slow_reader(url), slow_reader(url)
            process.wait_until_asked(texts + 2 * 7 * 64)
            assert process.answer() == process.expected
            assert process.metric(answered) == requests + 1  # The server still has events of both.
            leaving.close()
            with staying, staying.makefile("rb") as answer:
                events = answer.read()
            assert events.count(b'"finish_reason":"') == 7 * 64
            assert b"data: [DONE]" in events[-40:]
        memory.append(process.status("VmRSS"))
    assert memory[-1] < memory[0] + 30 * 1024


def test_nothing_that_the_openapi_file_describes_is_a_fault_of_the_server(server: Running) -> None:
    """Nor is what it does not allow; and answers are as it says."""
    load_all_checks()
    names = "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"
    checks = [CHECKS.get_one(name) for name in names]
    for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():

        @SETTINGS
        @hypothesis.given(case=found.ok().as_strategy())
        def asked(case: schemathesis.Case) -> None:
            case.validate_response(case.call(timeout=120), checks=checks)

        asked()
    server.wait_until_idle()
