"""A contest: contestants, which are processes or start one each time, take turns."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from benchmarks.worker import FailedError, OutOfTimeError, Worker, time_is_over

OURS, INT8 = "gpt_jax", "gpt_jax, int8"
PYTORCH = ("pytorch, eager", "pytorch, compiled")
TRANSFORMERS = "transformers"
"""The names of the contestants, in all results."""

T = TypeVar("T")


class Contest(ExitStack):
    """Contestants by name, and why those that are out failed. A context manager: leaving it ends the processes."""

    def __init__(self, needs: str | None = OURS) -> None:
        """needs: the contestant without which there is nothing to compare, if there is one."""
        super().__init__()
        self.needs = needs
        self.contestants: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str, target: str, **arguments: Any) -> Worker:
        """Starts a contestant; the arguments are those of Worker."""
        worker = self.contestants[name] = self.enter_context(Worker(target, **arguments))
        return worker

    def once(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The answer of each contestant to one question. Raises as `turns`."""
        return {name: found[0] for name, found in self.turns(1, lambda worker: worker.ask(method, **arguments)).items()}

    def turns(
        self, rounds: int, ask: Callable[[Any], T], show: Callable[[int, str, T], None] = lambda *_: None
    ) -> dict[str, list[T]]:
        """`rounds` answers of each contestant, who take turns, the order reversed every other round.

        One that fails is out: its reason goes into `failed`, and its answers are dropped. When the time of the whole
        run is over, the whole rounds until then are returned. Raises OutOfTimeError where there is none, and
        FailedError when the contestant failed that is needed.
        """
        answers: dict[str, list[T]] = {name: [] for name in self.contestants}
        for turn in range(rounds):
            if turn and time_is_over():
                break
            for name in list(answers)[:: -1 if turn % 2 else 1]:
                try:
                    answer = ask(self.contestants[name])
                except OutOfTimeError:
                    if not turn:
                        raise
                    return {name: values[:turn] for name, values in answers.items()}
                except FailedError as e:
                    self.failed[name] = str(e)
                    del self.contestants[name], answers[name]
                    print(f"  {name} is out: {e}", flush=True)
                    if name == self.needs:
                        raise FailedError(f"{name} failed: {e}") from e
                    continue
                answers[name].append(answer)
                show(turn, name, answer)
        return answers
