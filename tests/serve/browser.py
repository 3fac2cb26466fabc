"""A browser for tests of the chat page, and a server that can be brought into every situation it must bear."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.serve.http import page

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


def tokens_of(text: str) -> list[str]:
    """The text in pieces, each a word with the white space before it."""
    return re.findall(r"\s*\S+|\s+$", text)


class Scripted(ThreadingHTTPServer):
    """A server of OpenAI's protocol that says what a test wants, when it wants.

    reply: what the next answers say. Texts are sent at once, or, while `held`, a token each time the test calls `give`.
    refusals: statuses, with headers, of the next answers instead. requests: the bodies that came.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        self.models: list[dict[str, Any]] = [model("tiny")]
        self.reply: str | Callable[[dict[str, Any]], str] = "Hello there."
        self.alternatives: list[tuple[str, float]] = []
        self.finish = "stop"
        self.refusals: list[tuple[int, dict[str, str], dict[str, Any]]] = []
        self.failure: dict[str, Any] | None = None
        self.requests: list[dict[str, Any]] = []
        self.key: str | None = None
        self.health = 200
        self.held = False
        self.turns = threading.Semaphore(0)
        self.cut = threading.Event()
        self.gone = threading.Semaphore(0)  # Released when a client has left in the middle of an answer.
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def give(self, n: int = 1) -> None:
        """Lets n tokens go."""
        self.turns.release(n)

    def hold(self) -> None:
        """Sends tokens only as they are given."""
        self.held, self.turns = True, threading.Semaphore(0)

    def stop(self) -> None:
        """Ends as a killed process does: answers break off, and nothing listens."""
        self.cut.set()
        self.give(100_000)
        self.shutdown()
        self.server_close()


def model(name: str, chat: bool = True) -> dict[str, Any]:
    """A model as /v1/models tells it."""
    return {"id": name, "object": "model", "created": 1, "owned_by": "test", "chat": chat, "context_length": 2048}


class Handler(BaseHTTPRequestHandler):
    """Answers for `Scripted`."""

    server: Scripted

    def do_GET(self) -> None:
        """The page, the models, and whether the server is ready."""
        if self.path == "/":
            text, policy = page()
            policy += "; require-trusted-types-for 'script'"  # And what makes markup of a string is an error.
            self.send(200, text, {"Content-Type": "text/html", "Content-Security-Policy": policy})
        elif self.path == "/v1/models" and self.is_allowed():
            self.say(200, {"object": "list", "data": self.server.models})
        elif self.path == "/health":
            self.say(self.server.health, {"status": "ok" if self.server.health == 200 else "loading"})
        elif self.path == "/favicon.ico":
            self.send(204, b"", {})

    def do_POST(self) -> None:
        """An answer."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        self.server.requests.append(asked)
        if self.server.refusals:
            status, headers, error = self.server.refusals.pop(0)
            self.say(status, {"error": error}, headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(asked)
        except OSError:
            self.server.gone.release()

    def stream(self, asked: dict[str, Any]) -> None:
        """The events of an answer."""
        server, chat = self.server, self.path == "/v1/chat/completions"
        reply = server.reply if isinstance(server.reply, str) else server.reply(asked)
        tokens = tokens_of(reply)
        if chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for i, token in enumerate(tokens):
            if server.held:
                server.turns.acquire()
            if server.cut.is_set():
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            tops = [(token, -0.25), *server.alternatives] if i % 3 else [(" other", -0.2), (token, -1.75)]
            logprob = dict(tops)[token]
            if chat:
                content = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
                top = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in tops]
                logprobs: Any = {"content": [{**content, "top_logprobs": top}]}
                choice: dict[str, Any] = {"index": 0, "delta": {"content": token}}
            else:
                logprobs = {"tokens": [token], "token_logprobs": [logprob], "top_logprobs": [dict(tops)]}
                choice = {"index": 0, "text": token}
            wanted = asked.get("logprobs")
            self.event({"choices": [{**choice, "logprobs": logprobs if wanted else None, "finish_reason": None}]})
        if server.failure:
            self.event({"error": server.failure})
            return
        empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        self.event({"choices": [{"index": 0, **empty, "logprobs": None, "finish_reason": server.finish}]})
        usage = {"prompt_tokens": 12, "completion_tokens": len(tokens), "prompt_tokens_details": {"cached_tokens": 8}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: dict[str, Any]) -> None:
        """One event of a stream."""
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def is_allowed(self) -> bool:
        """Refuses requests without the key, if there is one."""
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self.say(401, {"error": {"message": "wrong key", "type": "invalid_request_error", "param": None, "code": None}})
        return False

    def say(self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """A response of JSON."""
        self.send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """A response."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


class Page:
    """The chat page in the browser. Elements are named by CSS selectors; what waits fails after `seconds`."""

    seconds = 60

    def __init__(self, driver: Any, server: Any) -> None:
        self.driver, self.server = driver, server

    def open(self, path: str = "") -> None:
        """Loads the page, and waits until it knows the models."""
        self.driver.get(f"{self.server.url.rstrip('/')}/{path}")
        self.until("return document.querySelector('#about').textContent !== ''")

    def script(self, code: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str, *arguments: Any) -> Any:
        """What JavaScript returns, once that is true."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if value := self.script(code, *arguments):
                return value
            time.sleep(0.02)
        raise AssertionError(
            f"not true in {self.seconds} s: {code} {arguments}; the page says: {self.text('body')[:2000]}"
        )

    def find(self, selector: str) -> Any:
        """The first element, once there is one that is shown."""
        found = "const e = document.querySelector(arguments[0]); return e && e.checkVisibility() ? e : null"
        return self.until(found, selector)

    def click(self, selector: str) -> None:
        """Clicks an element, which must be where a pointer can reach it."""
        element = self.find(selector)
        self.script("arguments[0].scrollIntoView({block: 'nearest'})", element)
        element.click()

    def text(self, selector: str) -> str:
        """The text of the first element."""
        return self.script("return document.querySelector(arguments[0])?.innerText ?? null", selector)

    def reads(self, selector: str, text: str) -> None:
        """Waits until the first element has this text in its own."""
        self.until("return document.querySelector(arguments[0])?.innerText.includes(arguments[1])", selector, text)

    def press(self, *keys: str) -> None:
        """Presses keys together, wherever the focus is; a single string is typed."""
        action_chains = pytest.importorskip("selenium.webdriver").ActionChains
        actions = action_chains(self.driver)
        if len(keys) == 1:
            actions.send_keys(keys[0])
        else:
            for key in keys[:-1]:
                actions.key_down(key)
            actions.send_keys(keys[-1])
            for key in keys[:-1]:
                actions.key_up(key)
        actions.perform()

    def send(self, text: str) -> None:
        """Writes a message and sends it."""
        self.find("#prompt").click()
        self.command("Input.insertText", text=text)
        self.press("\ue007")

    def ask(self, text: str) -> str:
        """Sends a message, and returns the answer once it is complete."""
        before = len(self.bodies())
        self.send(text)
        self.until("return shown.length === arguments[0] && !running.size", before + 2)
        return self.bodies()[-1]

    def bodies(self) -> list[str]:
        """The texts of all messages that are shown, also of those out of sight, which are not drawn."""
        return self.script("return shown.map((message) => message.body.textContent)")

    def focused(self) -> str:
        """The text or the label of what has the focus."""
        return self.script("const e = document.activeElement; return e.ariaLabel || e.innerText || e.id || e.tagName")

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def resize(self, width: int, height: int = 900) -> None:
        """Makes the page as large as that, which may be less than a window can be."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def colours(self, scheme: str) -> None:
        """Makes the system's colours light or dark; nothing moves."""
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=named)

    def language(self, name: str) -> None:
        """Makes the browser's language another one, from the next page on."""
        agent = self.script("return navigator.userAgent")
        self.command("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=name)

    def is_quiet(self) -> None:
        """Fails where the page reported errors, or broke the policy. Statuses that are errors, and connections that
        were refused, are no errors of the page."""
        entries = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not [entry for entry in entries if "Failed to load resource" not in entry]


def started(downloads: Path) -> Any:
    """A browser of Debian without a window, in English, that keeps what is downloaded in a folder."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
    for program in (CHROMIUM, CHROMEDRIVER):
        if not shutil.which(program):
            pytest.skip(f"needs {program}, of Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,900"):
        options.add_argument(f"--{flag}")
    options.add_argument("--lang=en-US")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    driver.downloads = downloads
    return driver


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser for all tests of a process."""
    driver = started(tmp_path_factory.mktemp("downloads"))
    yield driver
    driver.quit()
