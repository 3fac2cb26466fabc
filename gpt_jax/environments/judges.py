"""Processes that judge answers, beside the one that trains."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from gpt_jax.data.shards import SplitName
from gpt_jax.data.worker import receive, send
from gpt_jax.environments import worker
from gpt_jax.errors import UserError


class JudgingError(UserError):
    """There is no reward for an answer. The message names the problem."""


class Judges:
    """Judges answers to the problems of an environment, several at a time. A context manager, which ends the processes.

    Each process opens the environment itself, and knows problems by split and number.
    """

    def __init__(self, name: str, options: Sequence[str], data: str, n_workers: int, timeout: float = 60.0) -> None:
        """name, options, data: see `open_environment`. timeout: seconds for one answer."""
        self.name, self.timeout = name, timeout
        self._arguments = [name, json.dumps([*options]), data]
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="judge")
        self._idle: queue.SimpleQueue[Judge] = queue.SimpleQueue()
        self._judges = [Judge(self._arguments) for _ in range(n_workers)]
        for judge in self._judges:
            self._idle.put(judge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for judge in self._judges:
            judge.process.kill()
        self._threads.shutdown()
        for judge in self._judges:
            judge.process.communicate()

    def submit(self, split: SplitName, number: int, answer: str) -> Future[float]:
        """The reward of an answer, to come. The future raises JudgingError, or UserError when the environment cannot be
        opened. Does not wait."""
        return self._threads.submit(self._reward, split, number, answer)

    def _reward(self, split: SplitName, number: int, answer: str) -> float:
        judge = self._idle.get()
        try:
            found, why = judge(json.dumps([split, number, answer]).encode(), self.timeout)
        finally:
            self._idle.put(judge)
        if "unopened" in found:
            raise UserError(found["unopened"])
        reward = found.get("reward")
        if isinstance(reward, float) and 0 <= reward <= 1:
            return reward
        why = why or found.get("raised") or f"gave {found['shown']}, which is no number from 0 to 1"
        raise JudgingError(f"problem {number} of {split}: the environment {self.name} {why}")


class Judge:
    """One process."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        """Starts the process. It finds this package where this process did."""
        package = str(Path(worker.__file__).parents[2])
        search_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,  # The parent handles Ctrl-C.
        )

    def __call__(self, task: bytes, timeout: float) -> tuple[dict[str, Any], str]:
        """What the process says to a task, and why it says nothing. One that has ended is started again."""
        if self.process.poll() is not None:
            self.process.communicate()
            self.start()
        hangs = threading.Event()

        def give_up() -> None:
            hangs.set()
            self.process.kill()

        timer = threading.Timer(timeout, give_up)
        timer.start()
        try:
            send(self.process.stdin, task)
            return json.loads(receive(self.process.stdout)), ""
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            if hangs.is_set():
                return {}, f"gave no reward within {timeout:g} s"
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            return {}, f"ended its process by {name}{' (is memory short?)' if status == -signal.SIGKILL else ''}"
        finally:
            timer.cancel()
