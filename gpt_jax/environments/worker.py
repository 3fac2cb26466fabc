"""A process that judges answers to the problems of one environment, which it opens itself.

Its argument is JSON: the name, the options and the data of `open_environment`. Requests and replies are JSON, in the
messages of `gpt_jax.data.worker`. The first request, null, is answered when the environment is open; any other one is
a list of [split, number, answer, `prompt_key` or ""], and each answer has a reply as soon as it is judged: with a
`reward`, an `error`, or, when the environment could not be opened, `refused`.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from gpt_jax.data.shards import SplitName
from gpt_jax.data.worker import receive, send
from gpt_jax.environments.environment import Environment, Problem, open_environment, raised
from gpt_jax.errors import UserError


def prompt_key(problem: Problem) -> str:
    """A hash of the prompt, by which two processes tell whether they have made the same problem."""
    prompt = problem.prompt.tolist() if isinstance(problem.prompt, np.ndarray) else problem.prompt
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()


class Judge:
    """Judges answers by an environment of a name."""

    def __init__(self, environment: Environment, name: str) -> None:
        self._environment = environment
        self._name = name
        self._problems: dict[SplitName, Sequence[Problem]] = {}

    def __call__(self, split: SplitName, number: int, answer: str, key: str) -> dict[str, Any]:
        """The reply to a request. Whatever the environment does becomes an error in it."""
        try:
            if split not in self._problems:
                self._problems[split] = self._environment.problems(split)
            problem = self._problems[split][number]
            if key and prompt_key(problem) != key:
                return {"error": f"the environment {self._name} makes other problems in every process"}
            reward: object = self._environment.reward(problem, answer)
            if isinstance(reward, bool | int | float | np.bool_ | np.integer | np.floating) and 0 <= reward <= 1:
                return {"reward": float(reward)}
            shown = " ".join(f"{reward!r:.100}".split())
            return {"error": f"the environment {self._name} returned {shown}, which is no number from 0 to 1"}
        except UserError as e:
            return {"error": str(e)}
        except BaseException as e:  # Also SystemExit.
            return {"error": f"the environment {self._name} raised {raised(e)}"}


def main() -> None:
    """Answers until stdin is closed, which also happens when the parent dies."""
    end_with_stdin()
    requests, replies = take_pipes()
    name, options, data = json.loads(sys.argv[1])
    try:
        judge = Judge(open_environment(name, options, data), name)
        opened = {}
    except UserError as e:
        opened = {"refused": str(e)}
    while True:
        try:
            asked = json.loads(receive(requests))
        except EOFError:
            os.killpg(os.getpid(), signal.SIGKILL)
        for reply in [opened] if asked is None else (judge(*one) for one in asked):
            if os.getpid() != os.getsid(0):  # A process that the environment has forked, and did not end.
                os._exit(1)
            with contextlib.suppress(BrokenPipeError):  # The parent is gone, and this process about to be ended.
                send(replies, json.dumps(reply).encode())


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Stdin and stdout, for this process alone: what an environment prints goes to stderr, and it reads nothing."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # Not stdout, which would hold back what is printed.
    return requests, replies


def end_with_stdin() -> None:
    """Starts a process that ends the session of this one, with what the environment has started, when stdin is closed:
    even where that hangs and holds the interpreter's lock, as some regular expressions do; or when this one has ended.
    """
    judge = os.getpid()
    if os.fork():
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)  # So that the parent sees the end of the one that judges.
    os.dup2(nothing, 2)
    pipe = select.poll()
    pipe.register(0, select.POLLHUP)  # Of the end of a pipe, all are told.
    while os.getppid() == judge and not pipe.poll(1000):
        pass
    os.killpg(judge, signal.SIGKILL)


if __name__ == "__main__":
    main()
