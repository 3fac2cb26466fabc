"""Processes that judge answers in parallel."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from gpt_jax.data.pool import WorkerDeathError, WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.data.shards import SplitName
from gpt_jax.environments import worker
from gpt_jax.environments.environment import Problem, ProblemError
from gpt_jax.errors import UserError

MOST_AT_ONCE = 256
"""Answers in a message. Where a process ends, the rest of its message is sent again."""

OPENING_SECONDS = 600.0
"""Within which a process opens its environment, which may read a large file or import a large package."""


class Asked(NamedTuple):
    """An answer that is to be judged."""

    request: tuple[SplitName, int, str, str]  # See `worker`.
    reward: "Future[float]"

    def settle(self, reply: dict[str, Any]) -> None:
        """Takes a reply of `worker`."""
        split, number, *_ = self.request
        if "refused" in reply:
            self.reward.set_exception(ProblemError(reply["refused"]))
        elif "error" in reply:
            self.reward.set_exception(ProblemError(f"problem {number} of {split}: {reply['error']}"))
        else:
            self.reward.set_result(float(reply["reward"]))


class Judges(WorkerPool):
    """Processes that judge answers, each of which opens the environment by itself. Use it in a `with` block, which ends
    them. A reward depends on the problem and the answer only, not on the number of processes, nor on time."""

    def __init__(self, name: str, options: Sequence[str], data: str, n_workers: int, timeout: float = 60.0) -> None:
        """name, options, data: see `open_environment`. timeout: seconds that an answer may take."""
        super().__init__(partial(JudgeProcess, name, options, data, timeout), n_workers)
        self._waiting: deque[Asked] = deque()
        self._taking = threading.Lock()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for asked in self._waiting:
            asked.reward.cancel()

    def submit(self, split: SplitName, number: int, answer: str, problem: Problem | None = None) -> "Future[float]":
        """The reward, later. problem: the problem itself, with which that of the process is compared.

        The future raises ProblemError, also when the environment cannot be opened.
        """
        key = "" if problem is None else worker.prompt_key(problem)
        asked = Asked((split, number, answer, key), Future())
        self._waiting.append(asked)
        self._threads.submit(self._judge_some)
        return asked.reward

    def _judge_some(self) -> None:
        """Has some of those judged that wait: many of many, which saves messages, and few of few, so that all processes
        end at about the same time; one process takes all that a message may have."""
        with self._taking:
            n = -(-len(self._waiting) // (2 * self._n_workers if self._n_workers > 1 else 1))
            some = [self._waiting.popleft() for _ in range(min(n, MOST_AT_ONCE))]
        try:
            while some:
                for reply in self._replies(some):
                    some.pop(0).settle(reply)
        except BaseException as e:  # Such as that there is no memory for another process: nobody is to wait for ever.
            for asked in some:
                asked.reward.set_exception(e)

    def _replies(self, some: Sequence[Asked]) -> list[dict[str, Any]]:
        """The replies to the first ones, one at least."""
        try:
            replies: list[dict[str, Any]] = json.loads(self._result(json.dumps([a.request for a in some]).encode()))
            return replies
        except UserError as e:  # Of the first one: what was judged before has its replies.
            return [{"error": str(e)}]


class JudgeProcess:
    """See Worker. A task is a list of answers, see `worker`. The result is a list of the replies to the first of them,
    up to the one at which the process ended, or whose time has passed, which is an error in it."""

    def __init__(self, name: str, options: Sequence[str], data: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._process = WorkerProcess(json.dumps([name, [*options], data]), module=worker.__name__)
        self._opened = False
        self._gone = ""  # How it has ended, if it has.

    def __call__(self, task: bytes) -> bytes:
        """See Worker."""
        if self._gone:
            raise WorkerDeathError(self._gone, idle=True)
        if not self._opened:
            [opened] = self._within(OPENING_SECONDS, b"null", 1, "was not open")
            if opened:
                return json.dumps([opened]).encode()
            self._opened = True
        n = len(json.loads(task))
        return json.dumps(self._within(self._timeout, task, n, "did not return")).encode()

    def _within(self, seconds: float, task: bytes, n: int, failure: str) -> list[dict[str, Any]]:
        """The n replies to a task, or those that came, each within that time, and an error."""
        replies: list[dict[str, Any]] = []
        with deadline(seconds, self._give_up) as move:
            try:
                for _, reply in zip(range(n), self._process.results(task), strict=False):
                    replies.append(json.loads(reply))
                    move()
            except (WorkerDeathError, UserError) as e:
                if self._gone:
                    replies.append({"error": f"the environment {self._name} {failure} within {seconds:g} s"})
                    return replies
                self._gone = str(e)
                if not replies:
                    raise WorkerDeathError(self._gone) from None
        return replies

    def _give_up(self) -> None:
        self._gone = "a worker process that hung was ended"
        self.kill()

    def kill(self) -> None:
        """See Worker."""
        self._process.kill()

    def close(self) -> None:
        """See Worker."""
        self._process.close()


@contextmanager
def deadline(seconds: float, give_up: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Calls `give_up`, in another thread, after so many seconds without a call of what it yields."""
    ends, done = time.monotonic() + seconds, threading.Event()

    def move() -> None:
        nonlocal ends
        ends = time.monotonic() + seconds

    def watch() -> None:
        while not done.wait(max(0.0, ends - time.monotonic())):
            if time.monotonic() >= ends:
                give_up()
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield move
    finally:
        done.set()
        watching.join()
