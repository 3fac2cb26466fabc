"""Processes that judge answers in parallel."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from gpt_jax.data.pool import WorkerDeathError, WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.data.shards import SplitName
from gpt_jax.environments import worker
from gpt_jax.environments.environment import Problem, ProblemError
from gpt_jax.errors import UserError

OPENING_SECONDS = 600.0
"""Within which a process opens its environment, which may read a large file or import a large package."""


class Judges(WorkerPool):
    """Processes that judge answers, each of which opens the environment by itself. Use it in a `with` block, which ends
    them. A reward depends on the problem and the answer only, not on the number of processes, nor on time."""

    def __init__(self, name: str, options: Sequence[str], data: str, n_workers: int, timeout: float = 60.0) -> None:
        """name, options, data: see `open_environment`. timeout: seconds that an answer may take."""
        super().__init__(partial(JudgeProcess, name, options, data, timeout), n_workers)

    def submit(self, split: SplitName, number: int, answer: str, problem: Problem | None = None) -> "Future[float]":
        """The reward, later. problem: the problem itself, with which that of the process is compared.

        The future raises ProblemError, and UserError when the environment cannot be opened.
        """
        key = "" if problem is None else worker.prompt_key(problem)
        return self._threads.submit(self._reward, split, number, answer, key)

    def _reward(self, split: SplitName, number: int, answer: str, key: str) -> float:
        try:
            reply = json.loads(self._result(json.dumps([split, number, answer, key]).encode()))
        except UserError as e:
            raise ProblemError(f"problem {number} of {split}: {e}") from e
        if "refused" in reply:
            raise UserError(reply["refused"])
        if "error" in reply:
            raise ProblemError(f"problem {number} of {split}: {reply['error']}")
        return float(reply["reward"])


class JudgeProcess:
    """See Worker. Its tasks and results are the requests and replies of `worker`, and their time is limited."""

    def __init__(self, name: str, options: Sequence[str], data: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._process = WorkerProcess(json.dumps([name, [*options], data]), module=worker.__name__)
        self._opened = self._hung = False

    def __call__(self, task: bytes) -> bytes:
        """See Worker."""
        if self._hung:
            raise WorkerDeathError("a worker process that hung was ended", idle=True)
        if not self._opened:
            opened = self._within(OPENING_SECONDS, b"null", "was not open")
            if json.loads(opened):
                return opened
            self._opened = True
        return self._within(self._timeout, task, "did not return")

    def _within(self, seconds: float, task: bytes, failure: str) -> bytes:
        """The result of a task, or UserError after that time."""

        def give_up() -> None:
            self._hung = True
            self.kill()

        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            return self._process(task)
        except WorkerDeathError:
            if not self._hung:
                raise
            raise UserError(f"the environment {self._name} {failure} within {seconds:g} s") from None
        finally:
            timer.cancel()

    def kill(self) -> None:
        """See Worker."""
        self._process.kill()

    def close(self) -> None:
        """See Worker."""
        self._process.close()
