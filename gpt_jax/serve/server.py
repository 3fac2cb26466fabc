"""The process that serves: its socket, its thread for the engine, and how it stops."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt_jax.errors import UserError
from gpt_jax.serve.http import Service

IDLE_SECONDS = 30
"""Time after which a connection is closed on which nothing is asked, or whose request does not go on."""


SECONDS_TO_END = 10
"""Time after the time of grace in which requests are told that they end."""


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server; port 0: any that is free. Raises UserError where it cannot have that one."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OverflowError:
        raise UserError(f"--port {port} is not possible: it is 0 to 65535") from None
    except OSError as e:
        hint = "; is another server running? --port takes another one" if "in use" in str(e.strerror) else ""
        raise UserError(f"{host}, port {port}: {e.strerror}{hint}") from None
    return bound


class Protocol(H11Protocol):
    """uvicorn's, which also closes connections on which a request does not begin, or stops before its body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Goes on to wait until all headers are there."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)


class Server(uvicorn.Server):
    """uvicorn's, which tells of signals, and after them ends as any other program does."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: int) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for what runs, but no longer than the time of grace; then it is told that it ends."""
        asyncio.get_running_loop().call_later(self.grace, self.service.worker.abandon)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM inside."""
        is_main = threading.current_thread() is threading.main_thread()  # No other thread is told of signals.
        taken = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop; a second SIGINT stops at once."""
        self.service.stop()
        super().handle_exit(sig, frame)


async def serve(service: Service, bound: socket.socket, grace: int, say: Callable[[str], None]) -> int:
    """Serves until a signal, and then for up to `grace` seconds what was asked before; returns the exit status.

    say: is told the address, once all is ready.
    """
    allow_many_files()
    worker = service.worker
    options: dict[str, Any] = {"http": Protocol, "ws": "none", "lifespan": "off", "log_level": "warning"}
    options |= {"access_log": False, "server_header": False, "proxy_headers": False}
    options |= {"timeout_keep_alive": IDLE_SECONDS, "timeout_graceful_shutdown": grace + SECONDS_TO_END}
    server = Server(uvicorn.Config(service.application(), **options), service, grace)

    def changed() -> None:
        if worker.failure:
            server.should_exit = True
        else:
            host, port = bound.getsockname()[:2]
            say(f"http://{f'[{host}]' if ':' in host else host}:{port}/")

    worker.start(changed)
    try:
        await server.serve(sockets=[bound])
    finally:
        worker.stop()
        await asyncio.to_thread(worker.thread.join, 10)
    if worker.failure:
        print("error: the engine's thread has failed, see above", file=sys.stderr)
    return 1 if worker.failure else 0


def allow_many_files() -> None:
    """Lets the process have as many files, and so connections, as the system allows it."""
    import resource  # Here, since Windows lacks it.

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
