"""Processes that judge: the same rewards as in this process, in parallel, and one clear line for what goes wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from gpt_jax.environments import judges as judges_module
from gpt_jax.environments.environment import Problem, ProblemError, open_environment
from gpt_jax.environments.judges import MOST_AT_ONCE, Judges
from gpt_jax.errors import UserError
from tests.commands import ROOT

ODD = """
import os, re, signal, subprocess, sys, time
import numpy as np
from gpt_jax.environments.environment import Problem

class Odd:
    def problems(self, split):
        return [Problem(f"{split} {i}", {}) for i in range(9)]

    def reward(self, problem, answer):
        return eval(answer)

def deeper(message):
    raise ValueError(message)

def slow(seconds):
    time.sleep(seconds)
    return 0.5

def noisy():
    print("hello from print")
    os.system("echo hello from a shell")
    sys.stdout.write("hello from stdout")
    return 0.25 if sys.stdin.read() == "" else 0.0

def orphan():
    subprocess.Popen(["sleep", "1000"])
    return time.sleep(1000)
"""


@pytest.fixture
def odd(tmp_path: Path) -> str:
    """An environment that evaluates answers, so that a test says what happens when one is judged."""
    (tmp_path / "odd.py").write_text(ODD)
    return f"{tmp_path / 'odd.py'}:Odd"


@pytest.mark.parametrize(("n_processes", "n_answers"), [(2, 50), (1, 3 * MOST_AT_ONCE)])
def test_rewards_are_those_of_a_call(n_processes: int, n_answers: int) -> None:
    """Also of more answers to one process than a message has."""
    options = ["digits=1", f"n_val={n_answers}"]
    environment = open_environment("arithmetic", options)
    problems = environment.problems("val")
    answers = [f"{problems[i].fields['answer'] + i % 2}" for i in range(n_answers)]
    with Judges("arithmetic", options, "", n_processes) as judges:
        futures = [judges.submit("val", i, answer, problems[i]) for i, answer in enumerate(answers)]
        rewards = [future.result() for future in futures]
    assert rewards == [environment.reward(problems[i], answer) for i, answer in enumerate(answers)]
    assert sum(rewards) == n_answers / 2


@pytest.mark.parametrize("text", ["\ud800", "\x00\n\xff", "\U0001f600" * 100_000], ids=["half", "bytes", "long"])
def test_an_answer_arrives_as_it_is(odd: str, text: str) -> None:
    with Judges(odd, [], "", 1) as judges:
        assert judges.submit("train", 0, f"float({text!r} == {text!a})").result() == 1.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("True", 1.0), ("1", 1.0), ("0.1", 0.1), ("np.float32(0.5)", 0.5), ("np.bool_(False)", 0.0), ("np.int8(1)", 1.0)],
)
def test_numbers_from_0_to_1_are_rewards(odd: str, answer: str, reward: float) -> None:
    with Judges(odd, [], "", 1) as judges:
        got = judges.submit("train", 0, answer).result()
    assert (got, type(got)) == (reward, float)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("float('nan')", "returned nan, which is no number from 0 to 1"),
        ("float('inf')", "returned inf, which is no number from 0 to 1"),
        ("2.0", "returned 2.0, which is no number from 0 to 1"),
        ("-1", "returned -1, which is no number from 0 to 1"),
        ("10**400", f"returned 1{'0' * 99}, which is no number from 0 to 1"),
        ("None", "returned None, which is no number from 0 to 1"),
        ("'1.0'", "returned '1.0', which is no number from 0 to 1"),
        ("[0.5,\n0.5]", "returned [0.5, 0.5], which is no number from 0 to 1"),
        ("np.complex64(1)", "returned np.complex64(1+0j), which is no number from 0 to 1"),
        ("np.ones((2, 2))", "returned array([[1., 1.], [1., 1.]]), which is no number from 0 to 1"),
        ("deeper('two\\nlines')", "raised ValueError: two lines (odd.py, line 14)"),
        ("1 / 0", "raised ZeroDivisionError: division by zero (odd.py, line 11)"),
        ("sys.exit(3)", "raised SystemExit: 3 (odd.py, line 11)"),
        ("signal.raise_signal(signal.SIGINT)", "raised KeyboardInterrupt (odd.py, line 11)"),
    ],
)
def test_what_is_no_reward_is_an_error(odd: str, answer: str, message: str) -> None:
    with Judges(odd, [], "", 1) as judges:
        with pytest.raises(ProblemError) as e:
            judges.submit("val", 7, answer).result()
        assert str(e.value) == f"problem 7 of val: the environment {odd} {message}"
        assert judges.submit("val", 7, "1").result() == 1.0  # The process goes on.


def test_a_problem_that_there_is_not_is_an_error(odd: str) -> None:
    with Judges(odd, [], "", 1) as judges, pytest.raises(ProblemError, match=r"^problem 9 of val: .* IndexError: list"):
        judges.submit("val", 9, "1").result()


def test_another_problem_is_not_judged(odd: str) -> None:
    """As where an environment draws its problems without a seed."""
    with Judges(odd, [], "", 1) as judges:
        assert judges.submit("val", 3, "1", Problem("val 3", {})).result() == 1.0
        with pytest.raises(ProblemError, match=r"^problem 4 of val: .* makes other problems in every process"):
            judges.submit("val", 4, "1", Problem("val 3", {})).result()


def test_what_is_printed_goes_to_stderr(odd: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Judges(odd, [], "", 1) as judges:
        assert judges.submit("train", 0, "noisy()").result() == 0.25
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.split("hello from ")) == ["", "a shell\n", "print\n", "stdout"]


def test_two_processes_overlap(odd: str) -> None:
    with Judges(odd, [], "", 2) as judges:
        [judges.submit("train", i, "slow(0.1)").result() for i in range(2)]  # Now both are open.
        start = time.monotonic()
        futures = [judges.submit("train", i, "slow(0.5)") for i in range(4)]
        assert time.monotonic() - start < 0.2
        assert [future.result() for future in futures] == [0.5] * 4
        assert time.monotonic() - start < 1.8


def test_a_hang_is_an_error(odd: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Judges(odd, [], "", 1, timeout=0.5) as judges:
        with pytest.raises(ProblemError) as e:
            judges.submit("train", 2, "time.sleep(1000)").result()
        assert str(e.value) == f"problem 2 of train: the environment {odd} did not return within 0.5 s"
        assert judges.submit("train", 2, "1").result() == 1.0
    assert capfd.readouterr().err == "a worker process that hung was ended; another one is started\n"


def test_opening_takes_none_of_the_time_of_an_answer(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(f"import time\ntime.sleep(1)\n{ODD}")
    with Judges(f"{tmp_path / 'slow.py'}:Odd", [], "", 1, timeout=0.5) as judges:
        assert judges.submit("train", 0, "1").result() == 1.0


def test_opening_ends_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges_module, "OPENING_SECONDS", 0.5)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)")
    with (
        Judges(f"{tmp_path / 'slow.py'}:Odd", [], "", 1) as judges,
        pytest.raises(UserError, match=r"slow\.py:Odd was not open within 0\.5 s"),
    ):
        judges.submit("train", 0, "1").result()


def test_a_process_that_is_killed_is_an_error(odd: str, capfd: pytest.CaptureFixture[str]) -> None:
    """When no other one does better."""
    with Judges(odd, [], "", 2) as judges:
        with pytest.raises(ProblemError, match=r"^problem 1 of train: a worker process was killed by SIGKILL \(is mem"):
            judges.submit("train", 1, "os.kill(os.getpid(), signal.SIGKILL)").result()
        assert judges.submit("train", 1, "1").result() == 1.0
    assert capfd.readouterr().err.count("another one is started") >= 2


def test_a_process_that_ends_is_an_error(odd: str) -> None:
    """It is that of the problem at which it ended, and others are judged."""
    with Judges(odd, [], "", 2) as judges:
        futures = [judges.submit("train", i, "os._exit(3)" if i == 7 else "0.5") for i in (*range(9),) * 3]
        for i, future in enumerate(futures):
            if i % 9 != 7:
                assert future.result() == 0.5
                continue
            with pytest.raises(
                ProblemError, match=r"^problem 7 of train: a worker process ended with status 3, number"
            ):
                future.result()


def test_no_other_process_can_be_started(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no memory: nobody waits for ever."""
    with Judges(odd, [], "", 1) as judges:
        assert judges.submit("train", 1, "1").result() == 1.0

        def start() -> None:
            raise OSError("no memory")

        monkeypatch.setattr(judges, "_start", start)
        futures = [judges.submit("train", i, "os.kill(os.getpid(), signal.SIGKILL)") for i in range(8)]
        for future in futures:
            assert future.exception(timeout=20) is not None


def test_a_process_that_an_environment_forks_is_no_judge(odd: str) -> None:
    with Judges(odd, [], "", 1) as judges:
        for _ in range(3):
            assert judges.submit("train", 1, "0.25 if os.fork() else 0.5").result() == 0.25


def test_an_environment_that_cannot_be_opened_is_the_error_itself(odd: str) -> None:
    message = f"the environment {odd}: there is no option x; it takes none"
    with pytest.raises(UserError) as here:
        open_environment(odd, ["x=1"])
    with Judges(odd, ["x=1"], "", 1) as judges:
        for _ in range(2):
            with pytest.raises(UserError) as e:
                judges.submit("train", 0, "1").result()
            assert str(e.value) == message
    assert str(here.value) == message


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(group: int) -> list[int]:
    """The processes of a group that are no zombies."""
    lines = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    rows = [line.split() for line in lines[1:] if line]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    return tmp_path / "pid"


def writes_pid(pid_file: Path, then: str) -> str:
    """An answer whose judging writes the number of its process."""
    return f"(open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}}\\n'), {then})[1]"


def read_pid(pid_file: Path) -> int:
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    return int(pid_file.read_text())


def test_leaving_ends_all_at_once(odd: str, pid_file: Path) -> None:
    """Also one that hangs, with what it has started; what has not begun is cancelled."""
    with Judges(odd, [], "", 1) as judges:
        hanging = judges.submit("train", 0, writes_pid(pid_file, "orphan()"))
        waiting = judges.submit("train", 1, "1")
        pid = read_pid(pid_file)
        wait_until(lambda: len(children(pid)) == 3)  # It has one beside it, and has started one.
        start = time.monotonic()
    assert time.monotonic() - start < 2
    wait_until(lambda: not children(pid))
    with pytest.raises(ProblemError):
        hanging.result()
    with pytest.raises(CancelledError):
        waiting.result()


PARENT = """
import sys
from gpt_jax.environments.judges import Judges
with Judges(sys.argv[1], [], "", 2) as judges:
    print(judges.submit("train", 0, sys.argv[2]).result())
"""


def start_parent(odd: str, answer: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, odd, answer],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # So that a test can interrupt all of its group, as a terminal does.
    )


@pytest.mark.parametrize(("hangs", "n"), [("orphan()", 3), ("re.match('(a+)+$', 'a' * 60 + 'b')", 2)])
def test_the_processes_end_with_their_parent(odd: str, pid_file: Path, hangs: str, n: int) -> None:
    """Also one that hangs, with what it has started, or in code that holds the interpreter's lock. Each has one beside
    it."""
    with start_parent(odd, writes_pid(pid_file, hangs)) as parent:
        pid = read_pid(pid_file)
        wait_until(lambda: len(children(pid)) == n)
        parent.kill()
        wait_until(lambda: not children(pid))


def test_what_is_beside_a_process_ends_with_it(odd: str, pid_file: Path) -> None:
    """Also what the environment has started."""
    answer = writes_pid(pid_file, "(subprocess.Popen(['sleep', '1000']), os._exit(3))[1]")
    with Judges(odd, [], "", 1) as judges:
        with pytest.raises(ProblemError):
            judges.submit("train", 1, answer).result()
        pid = read_pid(pid_file)
        wait_until(lambda: not children(pid))


def test_an_interrupt_is_for_the_parent(odd: str, pid_file: Path) -> None:
    """Which then ends the processes, while they are at work."""
    with start_parent(odd, writes_pid(pid_file, "time.sleep(1000)")) as parent:
        pid = read_pid(pid_file)
        os.killpg(parent.pid, signal.SIGINT)
        _, err = parent.communicate(timeout=20)
        assert err.strip().endswith("KeyboardInterrupt")
        assert "ValueError" not in err
        assert not children(pid)


def test_the_processes_import_no_jax() -> None:
    code = "import sys, gpt_jax.environments.worker; print(sorted({'jax', 'flax', 'optax'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
