"""A process that judges answers: reads JSON [split, number, answer] from stdin, and writes an object to stdout, each in
the frames of `data.worker`."""

import json
import os
import sys
from typing import Any

import numpy as np

from gpt_jax.data.worker import receive, send
from gpt_jax.environments.environment import Environment, described, open_environment
from gpt_jax.errors import UserError


def judged(environment: Environment, task: bytes) -> dict[str, Any]:
    """The answer to a task: a reward, as a float if it is a number, and as it is shown, or what was raised."""
    split, number, answer = json.loads(task)
    try:
        reward = environment.reward(environment.problems(split)[number], answer)
        is_number = isinstance(reward, bool | int | float | np.number | np.bool)
        return {"reward": float(reward) if is_number else None, "shown": repr(reward)[:100]}
    except BaseException as e:  # Of the user's code, which may call sys.exit.
        return {"raised": f"raised {described(e)}"}


def main() -> None:
    """Judges until stdin is closed, which also happens when the parent dies. What the environment prints goes to
    stderr."""
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    name, options, data = sys.argv[1:]
    environment, unopened = None, ""
    try:
        environment = open_environment(name, json.loads(options), data)
    except UserError as e:
        unopened = str(e)
    try:
        while True:
            task = receive(sys.stdin.buffer)
            found = {"unopened": unopened} if environment is None else judged(environment, task)
            send(stdout, json.dumps(found).encode())
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
