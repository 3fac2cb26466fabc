"""Where tasks are done: by processes on this machine, or on a Ray cluster. The results are the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from gpt_jax.data.pool import WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.system import available_cores

EngineName = Literal["local", "ray"]

Engine = Callable[[str, str | Path], WorkerPool]
"""Makes a pool for one of `worker.JOBS` and its argument: a text, or the file of a tokenizer, in whose folder are no
files but those that belong to it."""


@contextmanager
def open_engine(name: EngineName, n_workers: int) -> Iterator[Engine]:
    """The engine. n_workers: 0: one per core, of this machine or of the cluster.

    Raises UserError when Ray is not installed, and when no cluster answers.
    """
    if name == "local":
        n = n_workers or available_cores()
        yield lambda job, argument: WorkerPool(partial(WorkerProcess, job, str(argument)), n)
    else:
        from gpt_jax.data.ray_actors import ray_workers

        with ray_workers(n_workers) as (starter, n):
            yield lambda job, argument: WorkerPool(starter(job, argument), n)
