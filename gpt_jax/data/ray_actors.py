"""Workers on a Ray cluster: actors, which Ray gives a core each, on whichever node has one.

They are not a Dataset of Ray Data. That is made of what is known in advance or is whole in memory, and the tasks are
neither: this process makes them while others are done.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Self

from gpt_jax.data.pool import WorkerDeathError
from gpt_jax.data.worker import JOBS
from gpt_jax.errors import UserError
from gpt_jax.system import available_cores

CONNECT_SECONDS = 10.0  # Ray itself would try for minutes.
MAX_ERROR = 200  # Characters of Ray's words, which are often a page.


class PrepareActor:
    """What runs on the cluster."""

    def __init__(self, job: str, argument: str, files: dict[str, bytes]) -> None:
        """files: those that `argument` names, and that belong to it."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self._job = JOBS[job](str(Path(folder, argument)) if files else argument)

    def run(self, task: bytes) -> bytes:
        return self._job(task)


class RayWorker:
    """See Worker."""

    def __init__(self, ray: Any, arguments: tuple[object, ...]) -> None:
        """arguments: those of PrepareActor, of which any may be stored on the cluster."""
        self._ray = ray
        self._actor = ray.remote(num_cpus=1)(PrepareActor).remote(*arguments)
        self._made = self._actor.__ray_ready__.remote().future()

    def when_ready(self, then: Callable[[Self], object]) -> None:
        """See Worker."""
        self._made.add_done_callback(lambda _: then(self))

    def __call__(self, task: bytes) -> bytes:
        """See Worker."""
        errors, idle = self._ray.exceptions, False
        try:
            self._made.result()
            idle = True
            self._ray.get(self._actor.__ray_ready__.remote())
            idle = False
            result: bytes = self._ray.get(self._actor.run.remote(task))
            return result
        except errors.RayTaskError:  # The job raised it, as it would anywhere.
            raise
        except errors.RayError as e:
            lines = str(e).strip().splitlines()
            why = lines[-1 if isinstance(e, errors.RayActorError) else 0]
            why = why.split(". ")[0][:MAX_ERROR]
            raise WorkerDeathError(f"a worker on the Ray cluster died ({why})", idle) from None

    def kill(self) -> None:
        """See Worker."""
        self._ray.kill(self._actor)

    def close(self) -> None:
        """See Worker."""


@contextmanager
def ray_workers(n_workers: int) -> Iterator[tuple[Callable[[str, str | Path], Callable[[], RayWorker]], int]]:
    """Connects to the Ray cluster at RAY_ADDRESS, or starts one on this machine, unless this process has one already.

    Yields a function of a job and its argument (see Engine), which gives what starts a worker; and the number of
    workers, which is that of the cluster's cores when `n_workers` is 0. Raises UserError when Ray is not installed and
    when no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'gpt-jax[ray]'") from None
    # Ray prints what happens to its processes to standard output, where the result belongs.
    with redirect_stdout(sys.stderr):
        connect = not ray.is_initialized()
        if connect:
            _connect(ray, n_workers)
        try:

            def starter(job: str, argument: str | Path) -> Callable[[], RayWorker]:
                files = {} if isinstance(argument, str) else _files_beside(argument)
                stored = ray.put(files)  # Once, and not with each worker.
                return lambda: RayWorker(ray, (job, argument if isinstance(argument, str) else argument.name, stored))

            yield starter, n_workers or max(1, int(ray.cluster_resources().get("CPU", 0)))
        finally:
            if connect:
                ray.shutdown()


def _connect(ray: Any, n_workers: int) -> None:
    """Raises UserError when no cluster answers."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": n_workers or available_cores(), "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # It would report to its makers.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if ":" in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS = {address} ({why}); it is HOST:PORT of the head node, auto on the "
            "nodes of a cluster, or local"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own.


def _files_beside(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
