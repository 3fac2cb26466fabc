"""Random requests and cancellations through one engine: `python -m tests.sample.soak [--requests N] [--model llama]`.

Compiles as users' programs do. Afterwards no slot may be lost, memory may not have grown, nothing may have been
compiled after the beginning, and the answers to a sample of the requests must be the same alone, to the last bit.
"""

import argparse
import logging
import resource
import sys
import time

import jax
import numpy as np

from gpt_jax import runtime


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


class Compiled(logging.Handler):
    """Counts the programs that JAX's log tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Compiling "):
            self.programs.append(record.getMessage()[:100])


def soak(name: str, n_requests: int, n_slots: int, seed: int, n_checked: int) -> list[str]:
    """What went wrong."""
    from tests.sample.engines import Answers, engine_of, random_requests

    rng = np.random.default_rng(seed)
    engine = engine_of(name, n_slots=n_slots)
    answers, known = Answers(engine), random_requests(seed, 500)
    alone = {}
    for number in rng.choice(len(known), n_checked, replace=False).tolist():
        engine.reset()
        [alone[number]] = Answers(engine).all([known[number]])
    answers.all(known[:60])  # Compiles what there is to compile.
    compiled = Compiled()
    logging.getLogger("jax").addHandler(compiled)
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax").propagate = False

    wrong: list[str] = []
    asked: dict[int, int] = {}
    done = compared = cancelled = 0
    begin, before = time.monotonic(), 0
    while done + cancelled < n_requests:
        while len(asked) < min(40, n_requests - done - cancelled):
            number = int(rng.integers(len(known)))
            asked[answers.ask(known[number])] = number
        answers.turn()
        if rng.random() < 0.05:
            id = int(rng.choice(list(asked)))
            if not answers.answers.get(id, ("",))[-1]:
                engine.cancel(id)
                del asked[id]
                answers.answers.pop(id, None)
                cancelled += 1
        for id in [id for id in asked if answers.answers.get(id, ("",))[-1]]:
            number, answer = asked.pop(id), answers.answers.pop(id)
            done += 1
            if number in alone:
                compared += 1
                if answer != alone[number]:
                    wrong.append(f"request {number} was answered in another way than alone")
        if done + cancelled >= n_requests // 4 and not before:
            before = resident_bytes()
    for id in asked:
        engine.cancel(id)
    while not engine.is_idle:
        answers.turn()
    grown = resident_bytes() - before
    if sorted(engine.scheduler.free) != list(range(n_slots)) or engine.tasks or engine.scheduler.tickets:
        wrong.append(f"slots or requests were lost: {engine.scheduler}")
    if compiled.programs:
        wrong.append(f"programs were compiled: {compiled.programs[:3]}")
    if grown > 50e6:
        wrong.append(f"memory has grown by {grown / 1e6:.0f} MB after the first quarter")
    seconds = time.monotonic() - begin
    print(
        f"{name}, {n_slots} slots: {done} answers, {compared} of them compared, {cancelled} cancelled in "
        f"{seconds:.0f} s; {engine.counts}; memory {grown / 1e6:+.1f} MB since the first quarter; "
        f"{len(compiled.programs)} programs compiled",
        flush=True,
    )
    return wrong


def main() -> int:
    """Exit status 1 when something went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--model", default="llama", help="gpt2, llama, gemma, adapted or int8")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checked", type=int, default=50, help="requests whose answers are compared with those alone")
    args = parser.parse_args()
    runtime.setup()
    wrong = soak(args.model, args.requests, args.slots, args.seed, args.checked)
    for line in sorted(set(wrong)):
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
