"""Trains in processes that are killed again and again, at any time."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.commands import records, run, start


def kill_when(process: "subprocess.Popen[str]", due: Callable[[], bool], signum: int) -> bool:
    """Sends the signal as soon as `due()`; False when the process ended before that."""
    while not due():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.send_signal(signum)
    process.communicate(timeout=120)
    return True


class Attempt:
    """A process that trains in `out`, or goes on there with what an older one left."""

    def __init__(self, arguments: list[object], out: Path) -> None:
        self.out = out
        self.older_file = self.records_file()
        saved = (path.name for path in (out / "checkpoints").glob("*"))
        self.begin = max((int(name) for name in saved if name.isdigit()), default=0)  # The step it will go on from.
        self.start = time.monotonic()
        self.process = start("train", "--auto-resume", *arguments, f"--out-dir={out}")

    def records_file(self) -> int:
        """Which file metrics.jsonl is: every process makes its own, once it has restored the state and cleared away
        the checkpoints that a killed one did not finish."""
        path = self.out / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def has_run(self, seconds: float) -> bool:
        return time.monotonic() >= self.start + seconds

    def has_trained(self, steps: int) -> bool:
        return self.records_file() != self.older_file and len(records(self.out)) >= self.begin + steps

    def is_saving(self) -> bool:
        return self.records_file() != self.older_file and self.has_unfinished()

    def has_unfinished(self) -> bool:
        """Whether there is a checkpoint that is not complete."""
        return any((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def train_killed(folder: Path, arguments: list[object], most_steps: int, *last: object, kills: int = 10) -> list[Path]:
    """The folders of runs that were killed as often: after at most so many steps of a process, at any time from its
    start on, and in the middle of a checkpoint. All of them have come to their end, the last one with the flags `last`,
    since a run that comes there before enough processes were killed is followed by another one."""
    rng = random.Random(0)
    runs = [folder / "0"]
    killed, in_checkpoint, seconds_to_train = 0, 0, 0.0
    for attempt in range(4 * kills):
        if killed >= kills and in_checkpoint >= kills // 3:
            break
        kind = ("step", "time", "checkpoint")[attempt % 3]
        ours = Attempt(arguments, runs[-1])
        all_due: dict[str, Callable[[], bool]] = {
            "step": partial(ours.has_trained, rng.randint(1, most_steps)),
            "time": partial(ours.has_run, rng.random() * seconds_to_train),  # Start, restore and compilation included.
            "checkpoint": ours.is_saving,
        }
        if not kill_when(ours.process, all_due[kind], signal.SIGKILL):
            _, stderr = ours.process.communicate()
            assert ours.process.returncode == 0, stderr
            runs.append(folder / str(len(runs)))
            continue
        if kind == "step":
            seconds_to_train = time.monotonic() - ours.start
        killed += 1
        in_checkpoint += kind == "checkpoint" and ours.has_unfinished()
    assert killed >= kills
    assert in_checkpoint >= kills // 3
    run("train", "--auto-resume", *arguments, f"--out-dir={runs[-1]}", *last)
    return runs
