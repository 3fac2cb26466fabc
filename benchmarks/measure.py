"""Clocks, memory, and whole commands: what is measured, said once for all parts."""

import contextlib
import ctypes
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.worker import ROOT, FailedError, last_line, limit_seconds, too_late


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and extremes of theirs over ours, round by round: how many times as fast, where the values are times."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def best_of_ten(work: Callable[[], object], amount: float) -> float:
    """`amount` over the seconds of a call, the shortest of ten, after one to warm up."""
    work()
    return amount / min(seconds_of(work) for _ in range(10))


def peak_memory() -> int:
    """Bytes of memory that this process has held at most, libraries and compilation included."""
    return memory_of("self", "VmHWM")


def memory_of_libraries(on_cpu: bool) -> int:
    """Bytes that this process holds, asked before there are arrays; on an accelerator it holds nothing then."""
    return memory_of("self", "VmRSS") if on_cpu else 0


def memory_of(pid: int | str, field: str) -> int:
    """A field of a process's status in /proc, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) * 1024
    return 0


def forget_peak() -> None:
    """Gives back what this process has freed, and lets `peak_memory` begin anew (proc(5), clear_refs)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Peak:
    """The most memory that processes held, in bytes."""

    all: int = 0  # Together; pages that they share are counted in each.
    largest: int = 0  # The one that held the most.


@contextlib.contextmanager
def watched_memory(every: float = 0.2) -> Iterator[Peak]:
    """What all processes below this one hold at most until the block ends, looked at every so many seconds."""
    peak, over = Peak(), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            pids = processes_below(os.getpid())
            peak.all = max(peak.all, sum(memory_of(pid, "VmRSS") for pid in pids))
            peak.largest = max([peak.largest, *(memory_of(pid, "VmHWM") for pid in pids)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def processes_below(root: int) -> list[int]:
    """The ids of the processes that a process started, and of those that they started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # It has just ended.
            parents[int(status.parent.name)] = int(status.read_text().partition("PPid:")[2].split()[0])
    tree = [root]
    for pid in tree:  # It grows by the children of each.
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree[1:]


class Command(NamedTuple):
    """A command that has ended."""

    lines: list[tuple[float, str]]  # Of standard output, each with the seconds after which it came.
    seconds: float
    peak_bytes: int  # The most memory that it held, libraries included.


def run_command(
    *arguments: str,
    program: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    until: str | None = None,
) -> Command:
    """Runs a program, Python if none is named, at the root of the repository, to its end or until it prints a line that
    begins so.

    environment: variables besides those of this process. Raises FailedError when the command fails or takes too long,
    and OutOfTimeError. The process has ended when this returns or raises.
    """
    begin, limit = time.monotonic(), limit_seconds()
    lines: list[tuple[float, str]] = []
    stopped = False
    command, env = [program, *arguments], {**os.environ, **(environment or {})}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=env) as process,
    ):
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append((time.monotonic() - begin, line.removesuffix("\n")))
                if until is not None and line.startswith(until):
                    stopped = True
                    process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            process.kill()
        seconds = time.monotonic() - begin
        if process.returncode and not stopped:
            if seconds >= limit:
                raise too_late(limit)
            raise FailedError(f"ended with status {process.returncode}{last_line(log)}")
        return Command(lines, seconds, usage.ru_maxrss * 1024)
