"""Contestants as processes: they answer, take turns, and are out when they fail."""

import json
from pathlib import Path

import pytest

from benchmarks import worker
from benchmarks.results import Results, ratios, spread
from benchmarks.worker import FailedError, Worker, take_turns
from gpt_jax.errors import UserError

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
    workers = {"a": Worker(COUNTER, start=0), "b": Worker(COUNTER, start=10), "c": Worker(COUNTER, start=20)}
    failed: dict[str, str] = {}

    def ask(asked: Worker) -> int:
        fails = asked is workers.get("b") and len(order) > 3
        return int(asked.ask("fail" if fails else "next"))

    answers = take_turns(workers, 3, ask, lambda turn, name, _: order.append(f"{name}{turn}"), failed)
    for each in workers.values():
        each.close()
    assert answers == {"a": [1, 2, 3], "c": [21, 22, 23]}
    assert order == ["a0", "b0", "c0", "c1", "a1", "a2", "c2"]
    assert list(failed) == ["b"]
    assert list(workers) == ["a", "c"]


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


@pytest.mark.parametrize("content", ["", "[]", '{"machine": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no measurements"):
        Results(path, {"versions": {}, "flags": {}})
    assert path.read_text() == content


def test_no_row_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "machine.json", {"versions": {}, "flags": {}}, minutes=1e-9)
    assert not results.missing("train/a")
    assert "the time is over" in capsys.readouterr().out


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
