"""The order of results, how many tasks are in flight, and workers that die."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data.pool import ATTEMPTS, WorkerDeathError, WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.data.worker import START_OF_DOCUMENT
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer


class Reverser:
    """A worker in this process, which reverses its task. deaths: the tasks that it dies of, each as often as it is
    there; all workers share them. places: how many workers may be ready at one time."""

    def __init__(self, deaths: list[bytes], places: threading.Semaphore) -> None:
        self.deaths, self.places = deaths, places
        self.killed = threading.Event()
        self.placed = False

    def when_ready(self, then: Callable[["Reverser"], object]) -> None:
        def wait() -> None:
            self.places.acquire()
            self.placed = True
            then(self)

        if self.placed:
            then(self)
        else:
            threading.Thread(target=wait, daemon=True).start()

    def __call__(self, task: bytes) -> bytes:
        assert not self.killed.is_set()
        if task == b"hang":
            self.killed.wait()
            raise WorkerDeathError("killed")
        if task == b"broken":
            raise UserError("the worker gave up")
        if task in self.deaths:
            self.deaths.remove(task)
            raise WorkerDeathError("a worker died")
        if b"idle" in self.deaths:
            self.deaths.remove(b"idle")
            raise WorkerDeathError("a worker had died", idle=True)
        return task[::-1]

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.places.release()


def reversers(n_workers: int, deaths: list[bytes], n_places: int = 100) -> WorkerPool:
    return WorkerPool(partial(Reverser, deaths, threading.Semaphore(n_places)), n_workers)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(max_size=3), max_size=40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sets(st.binary(max_size=3), max_size=5),
)
def test_results_come_in_order(tasks: list[bytes], n_workers: int, places: int, deaths: set[bytes]) -> None:
    """Also when workers die, and when one never gets a place."""
    with reversers(n_workers, [*deaths] * (ATTEMPTS - 1), places) as pool:
        assert [*pool.encode(enumerate(tasks))] == [(i, task[::-1]) for i, task in enumerate(tasks)]


def test_a_task_that_every_worker_dies_of_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    deaths = [b"big"] * 100
    with reversers(2, deaths) as pool:
        results = pool.encode([(1, b"ab"), (2, b"big"), (3, b"cd")])
        assert next(results) == (1, b"ba")
        with pytest.raises(UserError, match=r"^a worker died, number 3 of the workers that had this task$"):
            next(results)
    assert len(deaths) == 100 - ATTEMPTS
    assert capsys.readouterr().err == "a worker died; another one is started\n" * (ATTEMPTS - 1)


def test_a_task_survives_the_loss_of_all_workers_that_waited(capsys: pytest.CaptureFixture[str]) -> None:
    """But not of more: they end by themselves."""
    with reversers(8, [b"idle"] * 8) as pool:
        assert [*pool.encode([(0, b"ab")])] == [(0, b"ba")]
    with reversers(8, [b"idle"] * 9) as pool, pytest.raises(UserError, match=r"^a worker had died, number 9 of"):
        [*pool.encode([(0, b"ab")])]


def test_a_worker_that_gives_up_is_an_error_at_once() -> None:
    with reversers(1, []) as pool, pytest.raises(UserError, match="gave up"):
        [*pool.encode([(0, b"broken")] * 9)]


def test_tasks_in_flight_are_bounded() -> None:
    taken = 0

    def tasks() -> Iterator[tuple[int, bytes]]:
        nonlocal taken
        for taken in range(1, 1000):
            yield taken, b"task"

    with reversers(3, []) as pool:
        for done, _ in itertools.islice(pool.encode(tasks()), 50):
            assert taken <= done + 2 * 3


@pytest.mark.parametrize("places", [0, 2])
def test_the_pool_ends_in_the_middle(places: int) -> None:
    """While its workers are busy, and while they wait for a place."""

    def tasks() -> Iterator[tuple[int, bytes]]:
        for i in range(4):
            yield i, b"hang"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reversers(2, [], places) as pool:
        [*pool.encode(tasks())]


def test_a_process_ends_at_once(tmp_path: Path) -> None:
    worker = WorkerProcess("text", str(ByteTokenizer().save(tmp_path)))
    worker.kill()
    with pytest.raises(WorkerDeathError, match="killed by SIGKILL"):
        worker(START_OF_DOCUMENT + b"some text")
    worker.close()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_a_process_that_is_killed_is_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_file = ByteTokenizer().save(tmp_path)
    text = START_OF_DOCUMENT + b"some text"

    def pids() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if os.fsencode(tokenizer_file) in process.read_bytes():
                    found.append(int(process.parent.name))
            except OSError:  # It has just ended.
                continue
        return found

    with WorkerPool(partial(WorkerProcess, "text", str(tokenizer_file)), 2) as pool:
        expected = [*pool.encode([(0, text)])]
        before = pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert [*pool.encode([(0, text), (1, text)])] == [*expected, (1, expected[0][1])]
        assert len(before) == len(pids()) == 2
        assert not {*before} & {*pids()}
    deadline = time.monotonic() + 10
    while pids():
        assert time.monotonic() < deadline
    note = "a worker process was killed by SIGKILL (is memory short?); another one is started\n"
    assert capsys.readouterr().err == note * 2
