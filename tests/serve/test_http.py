"""Who may ask, what is refused and how, and what goes wrong without the server going with it."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpt_jax.errors import UserError
from gpt_jax.sample.engine import Engine, Prompt
from gpt_jax.serve import gate
from gpt_jax.serve.gate import Rules
from gpt_jax.serve.server import listen
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests.cases import cases
from tests.commands import wait_for
from tests.serve.servers import CHAT, HELLO, Running, serving, tiny_engine


def test_models_health_metrics_and_the_page(server: Running) -> None:
    server.post("/v1/completions", prompt="The", max_tokens=3, **ENDLESS)
    [card] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (card["id"], card["chat"], card["context_length"]) == ("tiny", True, 256)
    assert httpx.get(f"{server.url}/v1/models/tiny").json() == card
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["gpt_jax_generated_tokens_total"]) >= 3
    assert float(values['gpt_jax_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values["gpt_jax_time_to_first_token_seconds_count"]) >= 1
    assert float(values["gpt_jax_slots"]) == 4
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


ENDLESS: dict[str, Any] = {"logit_bias": {str(token): -100 for token in CHAT.stop_ids}}
"""For answers that go on to their greatest length."""

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (COMPLETIONS, {}, "prompt", "required"),
    (COMPLETIONS, {"prompt": 3}, "prompt", "valid"),
    (COMPLETIONS, {"prompt": []}, "prompt", "at least 1"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt.1", "0"),
    (COMPLETIONS, {"prompt": [1, 10_000]}, None, "10000"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "1"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    (COMPLETIONS, {"prompt": "a", "n": 10**6}, "n", "less than"),
    (COMPLETIONS, {"prompt": "a", "n": "2"}, "n", "integer"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 257}, None, "context_length, 256"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
    (COMPLETIONS, {"prompt": "a" * 257}, None, "257 tokens"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "0"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p", "0"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop.0", "1 character"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 65}, "stop", "64"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"9999": 1}}, None, "9999"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
    (CHATS, {"messages": []}, "messages", "at least 1"),
    (CHATS, {"messages": [{"role": "king", "content": "a"}]}, None, "role 'king'"),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "only text"),
    (CHATS, {"messages": [{"role": "user", "content": "a" * 300}]}, None, "context_length"),
    (CHATS, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    (CHATS, {"messages": HELLO, "functions": []}, "functions", "not supported"),
    ("/v1/embeddings", {"input": "a" * 257}, None, "257 tokens"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", "not supported"),
    ("/tokenize", {}, "prompt", "either"),
    ("/detokenize", {"tokens": [9999]}, "tokens.0", "9999"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_named(
    server: Running, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    streams: list[dict[str, Any]] = [{}, {"stream": True}] if path.endswith("completions") else [{}]
    for stream in streams:
        error = server.post(path, 400, None, **body, **stream)["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
        is_too_long = words.startswith(("257 tokens", "context_length"))
        assert (error["code"] == "context_length_exceeded") == is_too_long
        assert "\n" not in error["message"]


def test_a_null_is_as_if_it_was_not_there(server: Running) -> None:
    server.post(COMPLETIONS, prompt="a", suffix=None, functions=None, max_tokens=1, seed=None)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "top_p": NaN}',
     b'{"prompt": ' + b"[" * 100_000, b'{"prompt": "a", "temperature": 1e999}', b'"' * 70_000],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_json_is_refused(server: Running, body: bytes) -> None:
    answer = httpx.post(server.url + COMPLETIONS, content=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_other_paths_and_methods(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    answer = httpx.get(server.url + COMPLETIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    error = server.post(COMPLETIONS, 404, prompt="a", model="other")["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny" in error["message"]
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404


def test_long_and_slow_bodies_are_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    def status(head: str, body: bytes = b"") -> str:
        with socket.create_connection((host, int(port)), 60) as client:
            client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
            return client.recv(1000).decode().split(" ")[1]

    assert status("Content-Length: 100000000") == "413"
    assert status("Transfer-Encoding: chunked", b"900000\r\n" + b"a" * 0x900000 + b"\r\n") == "413"
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    assert status("Content-Length: 100", b'{"prompt"') == "408"


def test_keys_are_asked_for() -> None:
    with serving(tiny_engine(), rules=Rules(keys=("one", "two"))) as server:
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}):
            assert server.post(COMPLETIONS, 401, headers, prompt="a")["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        for key in ("one", "two"):
            server.post(COMPLETIONS, 200, {"authorization": f"Bearer {key}"}, prompt="a", max_tokens=1)
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200
        assert httpx.get(f"{server.url}/openapi.json").json()["security"] == [{"key": []}]


def test_pages_of_elsewhere_may_not_ask() -> None:
    rules = Rules(hosts=("127.0.0.1", "localhost"), origins=("https://chat.example",))
    with serving(tiny_engine(), rules=rules) as server:
        own = server.url
        for origin, status in ((own, 200), ("https://chat.example", 200), ("https://evil.example", 403), ("null", 403)):
            answer = httpx.post(own + COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers={"origin": origin})
            assert answer.status_code == status
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://chat.example" else None)
        asks = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        assert httpx.options(own + COMPLETIONS, headers=asks).status_code == 200
        assert httpx.get(f"{own}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_a_model_without_a_template_continues_texts() -> None:
    with serving(tiny_engine(), ByteTokenizer()) as server:
        error = server.post(CHATS, 400, messages=HELLO)["error"]
        assert "no chat template" in error["message"]
        assert server.post(COMPLETIONS, prompt="a", max_tokens=2, **ENDLESS)["usage"]["completion_tokens"] == 2
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["chat"] is False


def test_the_log_has_no_texts_unless_asked(server: Running) -> None:
    answer = httpx.post(
        server.url + COMPLETIONS,
        json={"prompt": "secret", "max_tokens": 2, **ENDLESS},
        headers={"x-request-id": "me-1"},
    )
    assert answer.headers["x-request-id"] == "me-1"
    wait_for(lambda: server.log[-1]["id"] == "me-1")
    assert (
        server.log[-1] | {"prompt_tokens": 6, "completion_tokens": 2, "status": 200, "model": "tiny"} == server.log[-1]
    )
    assert "secret" not in json.dumps(server.log)
    other = httpx.post(server.url + COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "no {} such id"})
    assert len(other.headers["x-request-id"]) == 32
    with serving(tiny_engine(), rules=Rules(log_texts=True)) as open_server:
        answer = open_server.post(COMPLETIONS, prompt="secret", max_tokens=2, seed=1)
        wait_for(lambda: open_server.log)
        line = open_server.log[-1]
        assert line["request"] == {"prompt": "secret", "max_tokens": 2, "seed": 1}
        assert line["answers"] == [answer["choices"][0]["text"]]


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(tiny_engine(n_slots=1, most_waiting=2)) as server:
        body = {"prompt": "a", "max_tokens": 60}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: httpx.post(server.url + COMPLETIONS, json=body, timeout=60), range(12)))
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        server.wait_until_idle()
        server.post(COMPLETIONS, prompt="a", n=3)
        assert server.post(COMPLETIONS, 429, prompt="a", n=4)["error"]["code"] == "queue_full"
        assert "gpt_jax_rejected_requests_total" in httpx.get(f"{server.url}/metrics").text
        server.wait_until_idle()


def test_who_leaves_frees_the_slot(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 250, "temperature": 1.5, "n": 64, **ENDLESS}
    before = server.engine.counts.cancelled
    for stream in (True, False):
        asked = {**body, "stream": stream}
        with (
            suppress(httpx.TimeoutException),
            httpx.stream("POST", server.url + COMPLETIONS, json=asked, timeout=60 if stream else 0.3) as answer,
        ):
            next(answer.iter_lines())
        server.wait_until_idle()
        wait_for(lambda: server.log[-1]["status"] == gate.LEFT)
    assert server.engine.counts.cancelled > before
    assert server.log[-1]["completion_tokens"] < 64 * 250


def open_files() -> int:
    """How many files and sockets this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("n", cases([80, 2000], [80]))
def test_who_leaves_at_any_moment_leaves_nothing_behind(server: Running, n: int) -> None:
    expected = server.post(COMPLETIONS, prompt="The end", max_tokens=30, temperature=0)["choices"]
    files, threads = open_files(), threading.active_count()

    def leave(i: int) -> None:
        body: dict[str, Any] = {"prompt": "a" * (1 + i * 7 % 200), "max_tokens": 1 + i % 50, "stream": i % 3 > 0}
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as client:
            client.sendall(head[: len(head) * (i % 20 + 1) // 20])
            time.sleep(i % 7 / 100)
            if i % 5 == 0:
                client.recv(200)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(n)))
    server.wait_until_idle()
    assert server.post(COMPLETIONS, prompt="The end", max_tokens=30, temperature=0)["choices"] == expected
    assert sorted(server.engine.scheduler.free) == list(range(server.engine.n_slots))
    wait_for(lambda: open_files() <= files + 2)
    assert threading.active_count() <= threads


class BrokenError(Exception):
    """An engine's failure."""


def test_a_request_that_makes_the_engine_fail_ends_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body: dict[str, Any] = {"prompt": "The end", "max_tokens": 100, "temperature": 1.0, "seed": 5}
    expected = server.post(COMPLETIONS, **body)["choices"]
    cursed = CHAT.encode("cursed" * 30)
    read_chunk = Engine._read_chunk

    def fails(self: Engine, prompt: Prompt) -> int:
        if prompt.tokens[:6] == cursed[:6]:
            raise BrokenError("out of luck")
        return read_chunk(self, prompt)

    monkeypatch.setattr(Engine, "_read_chunk", fails)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(lambda: server.post(COMPLETIONS, **body)["choices"]) for _ in range(3)]
        error = server.post(COMPLETIONS, 500, prompt=cursed, max_tokens=3)["error"]
        events = server.events(COMPLETIONS, prompt="The end", max_tokens=5)
        assert [other.result() for other in others] == [expected] * 3
    assert error["message"] == "the engine failed: BrokenError: out of luck"
    assert events
    assert server.post(COMPLETIONS, **body)["choices"] == expected


def test_a_failure_while_texts_are_written_is_tried_again_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {"prompt": "The end", "max_tokens": 100, "temperature": 0}
    expected = server.post(COMPLETIONS, **body)["choices"]
    decode, fails = Engine._decode, [False, False, True]

    def decode_or_fail(self: Engine) -> Any:
        if self.scheduler.writing and fails and fails.pop(0):
            raise BrokenError("a bad day")
        return decode(self)

    monkeypatch.setattr(Engine, "_decode", decode_or_fail)
    assert server.post(COMPLETIONS, **body)["choices"] == expected
    fails += [True] * 4
    assert server.post(COMPLETIONS, 500, **body)["error"]["code"] == "engine_failed"
    fails.clear()
    assert server.post(COMPLETIONS, **body)["choices"] == expected


def test_a_bug_in_the_text_of_one_does_not_end_others(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_jax.sample.generate import Row

    take = Row.take

    def fails(self: Row, progress: Any) -> Any:
        if self.result.prompt_tokens[0] == ord("!"):
            raise BrokenError("no words")
        return take(self, progress)

    monkeypatch.setattr(Row, "take", fails)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(lambda: server.post(COMPLETIONS, prompt="a", max_tokens=100, temperature=0))
        assert "no words" in server.post(COMPLETIONS, 500, prompt="!", max_tokens=3)["error"]["message"]
        events = server.events(COMPLETIONS, prompt="!", max_tokens=3)
        assert "no words" in events[-1]["error"]["message"]
        assert other.result()["choices"][0]["finish_reason"]


def test_ports_that_are_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="Address already in use; is another server running"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"nowhere\.invalid"):
        listen("nowhere.invalid", 0)
