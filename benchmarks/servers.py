"""Servers of OpenAI's protocol as contestants: how each is started with a model, and what a client sees of it."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import memory_of, processes_below
from benchmarks.results import Row
from benchmarks.worker import ENVIRONMENT, ROOT, FailedError, last_line, limit_seconds, too_late
from gpt_jax.storage.files import save_json, whole_folder

HOST = "127.0.0.1"


class How(NamedTuple):
    """How a model is served."""

    command: tuple[str, ...]  # Without --port.
    endless: Row  # The fields of a request with which an answer has as many tokens as it may have.
    environment: Mapping[str, str]  # Variables besides those of all contestants.


def ours(model: Path, slots: int, context_length: int, *options: str) -> How:
    """`gpt-jax serve` of a GGUF file. Raises UserError when it cannot be read."""
    from gpt_jax.run.load import open_source

    sizes = ("--slots", str(slots), "--context-length", str(context_length))
    stops = open_source(str(model)).tokenizer().stop_ids
    command = (sys.executable, "-m", "gpt_jax", "serve", "--model", str(model), *sizes, *options)
    return How(command, {"logit_bias": {str(stop): -100 for stop in stops}}, {})


def llama_server(program: str, model: Path, slots: int, context_length: int, threads: int) -> How:
    """llama.cpp's server of a GGUF file. Its context is that of all slots together."""
    sizes = ("--parallel", str(slots), "--ctx-size", str(slots * context_length), "--threads", str(threads))
    return How((program, "--model", str(model), "--host", HOST, *sizes), {"ignore_eos": True}, {})


def transformers_serve(folder: Path, slots: int, context_length: int, threads: int) -> How:
    """`transformers serve` of a folder that `write_for_transformers` wrote, with continuous batching. Its cache is
    limited to that of the others; it would take most of the memory."""
    command = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", HOST)
    options = ("--continuous-batching", "--cb-num-blocks", str(slots * context_length // PAGE))
    return How((*command, *options), {}, {"OMP_NUM_THREADS": str(threads)})


PAGE = 256
"""Tokens in a block of the cache of transformers."""


def write_for_transformers(model: Path, folder: Path) -> None:
    """Writes the model of a GGUF file in float32. Its settings name no token that ends an answer, because requests to
    `transformers serve` cannot ask for answers of a fixed length. Raises UserError when the file cannot be read."""
    from gpt_jax.interop.save import in_a_family, model_settings, write_model
    from gpt_jax.run.load import config_to_load, open_source
    from gpt_jax.tokenizer.export import export_tokenizer

    source = open_source(str(model))
    config, tokenizer = config_to_load(source), source.tokenizer()
    config, read, family = in_a_family(config, source.open_params(config))
    with whole_folder(folder) as unfinished:
        write_model(unfinished, family, config, read, "float32")
        save_json(unfinished / "config.json", model_settings(family, config, tokenizer, "float32"))
        save_json(unfinished / "generation_config.json", {})
        export_tokenizer(tokenizer, unfinished, config.context_length)


class Answer(NamedTuple):
    """An answer as its client saw it."""

    text: str
    first: float  # Seconds to its first characters, from when the request was due.
    seconds: float  # To its last ones.
    tokens: int
    prompt_tokens: int


class Server:
    """A server, which starts when it is first needed. A context manager: leaving it ends the process."""

    def __init__(self, how: How, caches: Path) -> None:
        """caches: the folder of what it keeps from one start to the next, such as compiled programs."""
        self.how, self.caches = how, caches
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the server)
        self.process: subprocess.Popen[bytes] | None = None
        self.port, self.model = 0, ""  # The model as the server calls it.

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets its processes run until the block ends, and starts them where there are none. They are stopped then, so
        that they take nothing from the others but memory. Raises as `start`."""
        self.signal(signal.SIGCONT)
        try:
            if self.process is None or self.process.poll() is not None:
                self.start()
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def start(self) -> None:
        """Starts the process, and waits until it says that it is ready. Raises FailedError when it ends or takes too
        long, and OutOfTimeError; it is ended then."""
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        caches = {"XDG_CACHE_HOME": str(self.caches), "JAX_COMPILATION_CACHE_DIR": str(self.caches / "xla")}
        variables = {**ENVIRONMENT, "JAX_ENABLE_COMPILATION_CACHE": "true", **caches, **self.how.environment}
        setpriv = shutil.which("setpriv")  # With it, the server is killed however this process ends.
        self.process = subprocess.Popen(
            [*((setpriv, "--pdeathsig", "KILL") if setpriv else ()), *self.how.command, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            cwd=ROOT,
            env={**os.environ, **variables},
            start_new_session=True,  # A group of its own, which signals reach as a whole.
        )
        limit, begin = limit_seconds(), time.monotonic()
        try:
            while not self.is_ready():
                if (status := self.process.poll()) is not None:
                    raise FailedError(f"ended with status {status}{last_line(self.log)}")
                if time.monotonic() - begin > limit:
                    raise too_late(limit)
                time.sleep(0.02)
            with closing(self.request("GET", "/v1/models")) as response:
                self.model = json.load(response)["data"][0]["id"]
        except BaseException:
            self.close()
            raise

    def is_ready(self) -> bool:
        """Whether it says that it is well."""
        try:
            with closing(self.request("GET", "/health")):
                return True
        except (OSError, http.client.HTTPException, FailedError):
            return False

    def ask(self, path: str, due: float | None = None, **body: Any) -> Answer:
        """The answer to a request, which is streamed and greedy, and has as many tokens as it may have.

        due: when it should have been sent, on the clock time.perf_counter(); None: now. Raises FailedError when there
        is no such answer.
        """
        begin = time.perf_counter() if due is None else due
        always = {"model": self.model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        text, times, usage = "", [], {"completion_tokens": 0}
        try:
            with closing(self.request("POST", path, always | self.how.endless | body)) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    seconds, event = time.perf_counter() - begin, json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise FailedError(f"error: {event['error']}")
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        if piece := choice.get("text") or choice.get("delta", {}).get("content"):
                            text += piece
                            times.append(seconds)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as e:
            raise FailedError(f"{type(e).__name__}: {e}") from e
        if not times or usage["completion_tokens"] != body["max_tokens"]:
            raise FailedError(f"an answer has {usage['completion_tokens']} tokens in place of {body['max_tokens']}")
        return Answer(text, times[0], times[-1], usage["completion_tokens"], usage["prompt_tokens"])

    def request(self, method: str, path: str, body: Row | None = None) -> http.client.HTTPResponse:
        """The response to a request on a connection of its own. Raises FailedError for a status other than 200, and
        OSError."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=limit_seconds())
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            with closing(response):
                raise FailedError(f"status {response.status}: {response.read(200).decode(errors='replace')}")
        return response

    def memory(self, field: str) -> int:
        """A field of the status of its processes in /proc, in bytes, together."""
        assert self.process is not None
        return sum(memory_of(pid, field) for pid in (self.process.pid, *processes_below(self.process.pid)))

    def signal(self, number: int) -> None:
        """Sends a signal to its processes, if there are any."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Ends the processes, if there are any."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process = None
