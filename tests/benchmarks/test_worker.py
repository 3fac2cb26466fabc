"""Contestants as processes: they answer, take turns, and are out when they fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import worker
from benchmarks.contest import Contest
from benchmarks.measure import ratios, spread
from benchmarks.results import Results
from benchmarks.worker import FailedError, OutOfTimeError, Worker
from gpt_jax.errors import UserError
from tests.commands import ROOT

pytestmark = pytest.mark.usefixtures("quick_contestants")

COUNTER = "tests.benchmarks.contestants:Counter"


def test_a_worker_answers_in_order() -> None:
    with Worker(COUNTER, start=5) as counter:
        assert [counter.ask("next"), counter.ask("next")] == [6, 7]
    assert counter.process.returncode == 0


@pytest.mark.parametrize(
    ("method", "reason"), [("fail", "MemoryError: out of memory:"), ("die", "ended with status 3"), ("nothing", "Attr")]
)
def test_a_failure_is_one_line(method: str, reason: str) -> None:
    with Worker(COUNTER, start=0) as counter:
        with pytest.raises(FailedError) as failure:
            counter.ask(method)
        assert str(failure.value).startswith(reason)
        assert "\n" not in str(failure.value)
        assert counter.process.returncode is not None


def test_one_that_cannot_be_made_fails() -> None:
    with Worker("benchmarks.nowhere:Nothing") as nobody, pytest.raises(FailedError, match="ModuleNotFoundError"):
        nobody.ask("next")


def test_one_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LIMIT_SECONDS", 2.0)
    with Worker(COUNTER, start=0) as counter:
        with pytest.raises(FailedError, match="no answer within 2 s"):
            counter.ask("sleep")
        assert counter.process.returncode is not None


def test_turns_alternate_and_who_fails_is_out() -> None:
    order: list[str] = []

    def ask(asked: Worker) -> int:
        fails = asked is b and len(order) > 3
        return int(asked.ask("fail" if fails else "next"))

    with Contest(needs="a") as contest:
        _, b, _ = (contest.add(name, COUNTER, start=start) for name, start in (("a", 0), ("b", 10), ("c", 20)))
        answers = contest.turns(3, ask, lambda turn, name, _: order.append(f"{name}{turn}"))
    assert answers == {"a": [1, 2, 3], "c": [21, 22, 23]}
    assert order == ["a0", "b0", "c0", "c1", "a1", "a2", "c2"]
    assert list(contest.failed) == ["b"]
    assert list(contest.contestants) == ["a", "c"]


def test_there_is_no_contest_without_the_one_that_is_needed() -> None:
    with Contest(needs="a") as contest:
        contest.add("a", COUNTER, start=0)
        contest.add("b", COUNTER, start=0)
        with pytest.raises(FailedError, match=r"^a failed: MemoryError: out of memory:$"):
            contest.once("fail")


def test_results_are_kept_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"name": "test", "versions": {"jax": "1"}, "flags": {}}
    path = tmp_path / "results" / "machine.json"
    Results(path, machine).put("train/a", {"x": 1})
    again = Results(path, machine)
    assert not again.missing("train/a")
    assert "measured already" in capsys.readouterr().out
    assert again.missing("train/b")
    again.put("train/b", {"x": 2})
    saved = json.loads(path.read_text())
    assert [row["x"] for row in saved["rows"].values()] == [1, 2]
    assert saved["rows"]["train/b"]["under"]["versions"] == {"jax": "1"}
    anew = Results(path, machine, again=True)
    assert anew.missing("train/a")
    anew.put("train/a", {"x": 3})
    assert not anew.missing("train/a")
    assert json.loads(path.read_text())["rows"]["train/b"]["x"] == 2


@pytest.mark.parametrize(
    ("now", "what"),
    [
        ({"versions": {"jax": "2"}}, "jax 1, and it is 2 now"),
        ({"versions": {}}, "jax 1, and it is not there now"),
        ({"flags": {"XLA_FLAGS": "--fast"}}, "XLA_FLAGS not recorded, and it is --fast now"),
        ({"memory_gib": 8}, "memory_gib 16, and it is 8 now"),
    ],
)
def test_a_row_of_other_versions_flags_or_memory_is_measured_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: dict[str, Any], what: str
) -> None:
    machine = {"name": "test", "memory_gib": 16, "versions": {"jax": "1"}, "flags": {}}
    path = tmp_path / "a" / "b" / "machine.json"
    Results(path, machine).put("train/a", {"x": 1})
    results = Results(path, {**machine, **now})
    assert results.missing("train/a")
    assert capsys.readouterr().out == f"train/a: measured anew, because it was measured with {what}\n"
    results.put("train/b", {"x": 2})
    rows = json.loads(path.read_text())["rows"]
    assert rows["train/a"]["under"]["machine"] == {"name": "test", "memory_gib": 16}
    assert rows["train/b"]["under"]["machine"]["memory_gib"] == now.get("memory_gib", 16)


def test_a_row_that_fails_is_a_line_and_the_next_has_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> dict[str, Any]:
        raise error

    results = Results(tmp_path / "machine.json", {"versions": {}, "flags": {}})
    results.measure("a", "first", fail, FailedError("gpt_jax failed: out of memory"))
    results.measure("b", "second", fail, UserError("they do not compute the same"))
    results.measure("c", "third", fail, OutOfTimeError("the time is over"))
    results.measure("d", "fourth", dict, {"x": 1})
    assert results.failed == ["a", "b"]
    assert list(results.rows) == ["d"]
    assert capsys.readouterr().out.splitlines()[1::2] == [
        "a: not measured: gpt_jax failed: out of memory",
        "b: not measured: they do not compute the same",
        "c: left out, the time was over before a whole round",
    ]


def test_the_whole_rounds_until_the_deadline_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third round a contestant does not answer any more, and the time is over while it is waited for."""
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.5)
    asked: list[str] = []

    def ask(counter: Worker) -> int:
        asked.append("late" if len(asked) == 5 else "")
        if asked[-1]:
            monkeypatch.setattr(worker, "deadline", time.monotonic())
        return int(counter.ask("sleep" if asked[-1] else "next"))

    with Contest() as contest:
        contest.add("a", COUNTER, start=0)
        contest.add("b", COUNTER, start=10)
        assert contest.turns(9, ask) == {"a": [1, 2], "b": [11, 12]}
        assert contest.failed == {}
    with Contest() as contest:
        contest.add("c", COUNTER, start=0)
        with pytest.raises(OutOfTimeError):
            contest.once("sleep")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    """The first run is interrupted in its second row, which would never end."""
    out = tmp_path / "a" / "b"
    results = out / "a-tpu.json"

    def command(steps: int, *more: str) -> list[str]:
        run = [sys.executable, "-m", "tests.benchmarks.interrupted", str(steps), "train", "--rounds", "1"]
        return [*run, "--out", str(out), *more]

    for more in ((), ("--again",)):
        process = subprocess.Popen(
            command(10**9, *more),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train/long:"):
                break
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to the contestants, too.
        said = process.communicate(timeout=60)[1].splitlines()[-1]
        assert process.returncode == 130
        assert list(json.loads(results.read_text())["rows"]) == ["train/short"]
        who = "without --again, the command" if more else "the same command"
        assert said == f"interrupted; what was measured is kept, and {who} goes on with what is missing"

    done = subprocess.run(command(1), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train/short: measured already" in done.stdout
    assert list(json.loads(results.read_text())["rows"]) == ["train/short", "train/long"]


@pytest.mark.slow
def test_a_run_with_a_row_that_fails_ends_with_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.interrupted", "0", "train", "--rounds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: not measured, for the reasons above: train/long\n"
    assert list(json.loads((tmp_path / "a-tpu.json").read_text())["rows"]) == ["train/short"]


@pytest.mark.parametrize("content", ["", "[]", '{"machine": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no measurements"):
        Results(path, {"versions": {}, "flags": {}})
    assert path.read_text() == content


def test_no_row_begins_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "deadline", time.monotonic() - 1)
    results = Results(tmp_path / "machine.json", {"versions": {}, "flags": {}})
    assert not results.missing("train/a")
    assert "the time is over" in capsys.readouterr().out


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
