"""Where sources are read and tokenized: on this machine, or on a Ray cluster. The results are the same."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from gpt_jax.data.pieces import Engine, Job, Piece, Reader
from gpt_jax.data.pool import WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.sources import Corpus
from gpt_jax.system import available_cores

EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class LocalEngine:
    """This process reads, and others on this machine work."""

    n_workers: int

    @contextmanager
    def run(
        self, title: str, corpus: Corpus, read: Reader, items: Sequence[Any], job: Job | None = None
    ) -> Iterator[Iterator[tuple[Any, bytes]]]:
        """See Engine."""
        pieces = (piece for item in items for piece in read(item))
        with progress_bar(title, corpus.n_bytes) as bar:

            def shown(results: Iterable[tuple[Piece, bytes]]) -> Iterator[tuple[Any, bytes]]:
                for piece, result in results:
                    bar.update(piece.n_read)
                    yield piece.label, result

            if job is None:
                yield shown((piece, piece.content) for piece in pieces)
            else:
                with WorkerPool(partial(WorkerProcess, job.name, str(job.argument)), self.n_workers) as pool:
                    yield shown(pool.results(pieces))


@contextmanager
def open_engine(name: EngineName, n_workers: int) -> Iterator[Engine]:
    """The engine. n_workers: 0: one per core, of this machine or of the cluster.

    Raises UserError when Ray is not installed, and when no cluster answers.
    """
    if name == "local":
        yield LocalEngine(n_workers or available_cores())
    else:
        from gpt_jax.data.ray_engine import ray_engine

        with ray_engine(n_workers) as engine:
            yield engine
