"""The order of results, how many tasks are in flight, and workers that die."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data.pieces import Piece
from gpt_jax.data.pool import ATTEMPTS, WorkerDeathError, WorkerPool
from gpt_jax.data.processes import WorkerProcess
from gpt_jax.data.worker import START_OF_DOCUMENT
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer


class Reverser:
    """A worker in this process, which reverses its task. deaths: the tasks that it dies of, each as often as it is
    there; all workers share them."""

    def __init__(self, deaths: list[bytes]) -> None:
        self.deaths = deaths
        self.killed = threading.Event()

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
        pass


def reversers(n_workers: int, deaths: list[bytes]) -> WorkerPool:
    return WorkerPool(partial(Reverser, deaths), n_workers)


def results(pool: WorkerPool, tasks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The number of each task, and its result."""
    pieces = (Piece(0, i, task, is_task=True) for i, task in enumerate(tasks))
    return ((piece.label, result) for piece, result in pool.results(pieces))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=3), st.booleans()), max_size=40),
    st.integers(1, 5),
    st.sets(st.binary(max_size=3), max_size=5),
)
def test_results_come_in_order(contents: list[tuple[bytes, bool]], n_workers: int, deaths: set[bytes]) -> None:
    """Also when workers die; what is no task passes them by."""
    pieces = [Piece(1, i, content, is_task) for i, (content, is_task) in enumerate(contents)]
    with reversers(n_workers, [*deaths] * (ATTEMPTS - 1)) as pool:
        expected = [(piece, piece.content[::-1] if piece.is_task else piece.content) for piece in pieces]
        assert [*pool.results(pieces)] == expected


def test_a_task_that_every_worker_dies_of_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    deaths = [b"big"] * 100
    with reversers(2, deaths) as pool:
        found = results(pool, [b"ab", b"big", b"cd"])
        assert next(found) == (0, b"ba")
        with pytest.raises(UserError, match=r"^a worker died, number 3 of the workers that had this task$"):
            next(found)
    assert len(deaths) == 100 - ATTEMPTS
    assert capsys.readouterr().err == "a worker died; another one is started\n" * (ATTEMPTS - 1)


def test_a_task_survives_the_loss_of_all_workers_that_waited(capsys: pytest.CaptureFixture[str]) -> None:
    """But not of more: they end by themselves."""
    with reversers(8, [b"idle"] * 8) as pool:
        assert [*results(pool, [b"ab"])] == [(0, b"ba")]
    with reversers(8, [b"idle"] * 9) as pool, pytest.raises(UserError, match=r"^a worker had died, number 9 of"):
        [*results(pool, [b"ab"])]


def test_a_worker_that_gives_up_is_an_error_at_once() -> None:
    with reversers(1, []) as pool, pytest.raises(UserError, match="gave up"):
        [*results(pool, [b"broken"] * 9)]


def test_tasks_in_flight_are_bounded() -> None:
    taken = 0

    def tasks() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"task"

    with reversers(3, []) as pool:
        for done, _ in itertools.islice(results(pool, tasks()), 50):
            assert taken <= done + 1 + 2 * 3


def test_the_pool_ends_in_the_middle() -> None:
    """While its workers are busy."""

    def tasks() -> Iterator[bytes]:
        yield from [b"hang"] * 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reversers(2, []) as pool:
        [*results(pool, tasks())]


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
        expected = [*results(pool, [text])]
        before = pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert [*results(pool, [text, text])] == [*expected, (1, expected[0][1])]
        assert len(before) == len(pids()) == 2
        assert not {*before} & {*pids()}
    deadline = time.monotonic() + 10
    while pids():
        assert time.monotonic() < deadline
    note = "a worker process was killed by SIGKILL (is memory short?); another one is started\n"
    assert capsys.readouterr().err == note * 2
