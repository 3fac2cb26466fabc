"""Reading and tokenizing on a Ray cluster, as a Dataset of Ray Data: two stages of tasks, which Ray places on its nodes
and does again when a worker or a node dies."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.data.pieces import Job, Piece, Reader
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.sources import Corpus
from gpt_jax.data.worker import JOBS
from gpt_jax.errors import UserError
from gpt_jax.system import available_cores

CONNECT_SECONDS = 10.0  # Ray itself would try for minutes.
ATTEMPTS = 3  # Workers that may die of one task, of memory or otherwise. Ray itself would go on for ever.
BLOCK_BYTES = 1 << 18  # Of the pieces that are passed on together. With Ray Data's 128 MiB, most workers would wait.
MAX_ERROR = 200  # Characters of Ray's words, which are often a page.

Rows = dict[str, list[bytes]]
"""Pieces, packed, as a column of a Dataset."""


@dataclass(frozen=True)
class RayEngine:
    """See Engine. A corpus is read by all nodes if all of its sources are remote, and else by this one."""

    ray: Any  # The package.
    n_workers: int

    @contextmanager
    def run(
        self, title: str, corpus: Corpus, read: Reader, items: Sequence[Any], job: Job | None = None
    ) -> Iterator[Iterator[tuple[Any, bytes]]]:
        """See Engine."""
        data = self.ray.data
        place, n_readers = dict[str, str](), self.n_workers
        if not all(source.is_remote for source in corpus.sources):
            place = {"ray.io/node-id": self.ray.get_runtime_context().get_node_id()}
            n_readers = min(n_readers, available_cores())
        options: dict[str, Any] = {"batch_size": 1, "max_retries": ATTEMPTS - 1}
        dataset = data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        # Reading takes no core: it mostly waits, and would keep from their work those for whom it reads.
        readers = {"compute": data.TaskPoolStrategy(n_readers), "num_cpus": 0, "label_selector": place}
        dataset = dataset.map_batches(_read, fn_args=(read,), **readers, **options)
        if job is not None:
            workers = {"compute": data.TaskPoolStrategy(self.n_workers), "num_cpus": 1}
            dataset = dataset.map_batches(_work, fn_args=(os.urandom(8), *_portable(job)), **workers, **options)
        with progress_bar(title, corpus.n_bytes) as bar, closing(self._results(dataset)) as results:

            def shown() -> Iterator[tuple[Any, bytes]]:
                for piece in results:
                    bar.update(piece.n_read)
                    yield piece.label, piece.content

            yield shown()

    def _results(self, dataset: Any) -> Generator[Piece]:
        errors = self.ray.exceptions
        try:
            for batch in dataset.iter_batches(batch_size=None):
                yield from map(_unpacked, batch["piece"])
        except errors.RayTaskError:  # A bug: what a user can mend comes as a piece.
            raise
        except errors.RayError as e:
            why = " ".join(str(e).split()).split(". ")[0][:MAX_ERROR]
            raise UserError(f"the Ray cluster failed ({why}); a task is tried {ATTEMPTS} times") from None


def _packed(piece: Piece, error: str = "") -> bytes:
    header = {"n_read": piece.n_read, "label": piece.label, "is_task": piece.is_task, "error": error}
    return json.dumps(header).encode() + b"\n" + piece.content


def _unpacked(packed: bytes) -> Piece:
    """Raises UserError where that was packed."""
    header, _, content = packed.partition(b"\n")
    fields = json.loads(header)
    if error := fields.pop("error"):
        raise UserError(error)
    return Piece(content=content, **fields)


def _read(batch: dict[str, Any], read: Reader) -> Iterator[Rows]:
    """The first stage: the pieces of an item, one by one."""
    [item] = batch["item"]
    try:
        for piece in read(item):
            yield {"piece": [_packed(piece)]}
    except UserError as e:
        yield {"piece": [_packed(Piece(0), str(e))]}


_jobs: dict[bytes, Callable[[bytes], bytes]] = {}
"""The job of this process, made for its first task, by its key."""


def _work(batch: dict[str, Any], key: bytes, job: Job, files: dict[str, np.ndarray]) -> Rows:
    """The second stage: the results of tasks. See `_portable`."""
    [packed] = batch["piece"]
    try:
        piece = _unpacked(packed)
        if piece.is_task:
            if key not in _jobs:
                _jobs.clear()
                _jobs[key] = _made(job, files)
            packed = _packed(piece._replace(content=_jobs[key](piece.content)))
    except UserError as e:
        packed = _packed(Piece(0), str(e))
    return {"piece": [packed]}


def _portable(job: Job) -> tuple[Job, dict[str, np.ndarray]]:
    """A job for other machines: its argument is the name of a file among those that go with it, if it is one."""
    name, argument = job
    if isinstance(argument, str):
        return job, {}
    files = [file for file in argument.parent.iterdir() if file.is_file()]
    # Arrays, so that the workers of a node share one copy.
    return Job(name, argument.name), {file.name: np.frombuffer(file.read_bytes(), np.uint8) for file in files}


def _made(job: Job, files: dict[str, np.ndarray]) -> Callable[[bytes], bytes]:
    """What is done with tasks, for what `_portable` gives."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content.tobytes())
        return JOBS[job.name](str(Path(folder, job.argument) if files else job.argument))


@contextmanager
def ray_engine(n_workers: int) -> Iterator[RayEngine]:
    """Connects to the Ray cluster at RAY_ADDRESS, or starts one on this machine, unless this process has one already.

    Its workers are as many as the cluster's cores when `n_workers` is 0. Raises UserError when Ray is not installed and
    when no cluster answers.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs Ray Data: pip install 'gpt-jax[ray]'") from None
    # Ray Data tells of each stage, and warns of tasks that are fewer than workers, and of max_retries.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.data|gpt_jax\.data\.ray_engine")
    # Ray prints what happens to its processes to standard output, where the result belongs.
    with redirect_stdout(sys.stderr), _ordered(ray.data.DataContext.get_current()):
        connect = not ray.is_initialized()
        if connect:
            _connect(ray, n_workers)
        try:
            yield RayEngine(ray, n_workers or max(1, int(ray.cluster_resources().get("CPU", 0))))
        finally:
            if connect:
                ray.shutdown()


@contextmanager
def _ordered(context: Any) -> Iterator[None]:
    """Has Ray Data keep the order, pass small blocks on, and show no progress, within the block."""
    options = context.execution_options
    before = options.preserve_order, context.enable_progress_bars, context.target_max_block_size
    options.preserve_order, context.enable_progress_bars, context.target_max_block_size = True, False, BLOCK_BYTES
    try:
        yield
    finally:
        options.preserve_order, context.enable_progress_bars, context.target_max_block_size = before


def _connect(ray: Any, n_workers: int) -> None:
    """Raises UserError when no cluster answers."""
    os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS - 1))  # max_retries is of other deaths.
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
