"""`solve` and `examples`: what is right is counted, on any device, and examples are what prepare and training take."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.data.shards import open_dataset
from tests.commands import TINY, refused_here, run_here

ENVIRONMENT = """
from gpt_jax.environments.environment import Made, Problem

class Echo:
    def __init__(self, right="a"):
        self.right = right
    def problems(self, split):
        return Made(20, lambda i: Problem("a" * (1 + i % 3), {"answer": "aaa"}))
    def reward(self, problem, answer):
        return float(self.right in answer)
"""
SUMS = ["--environment=arithmetic", "--options", "digits=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on lines of sums, made by `examples`, and an environment."""
    place = tmp_path_factory.mktemp("solve")
    (place / "echo.py").write_text(ENVIRONMENT)
    run_here("examples", *SUMS, "--n=300", f"--out={place / 'sums.jsonl'}")
    run_here("prepare", place / "sums.jsonl", "--out", place / "sums", "--tokenizer=bytes")
    flags = [f"--data.dir={place / 'sums'}", "--data.packing=documents", "--train.steps=30"]
    run_here("train", *TINY, *flags, f"--out-dir={place / 'run'}", "--optimizer.learning-rate=1e-2")
    return place


def test_examples_are_texts_or_conversations(place: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (place / "sums.jsonl").read_text().splitlines()]
    assert len(lines) == 300
    assert lines[0]["text"].count("=") == 1
    out = tmp_path / "chats.jsonl"
    run_here("examples", *SUMS, "chat=true", "--n=20", "--template=It is {answer}.", f"--out={out}")
    user, assistant = json.loads(out.read_text().splitlines()[0])["messages"]
    assert user["content"].startswith("What is ")
    run_here("examples", *SUMS, "--n=300", "--wrong=0.5", f"--out={tmp_path / 'wrong.jsonl'}")
    some = [json.loads(line)["text"].partition("=") for line in (tmp_path / "wrong.jsonl").read_text().splitlines()]
    assert 0.4 < np.mean([int(text) == eval(sum_) for sum_, _, text in some]) < 0.65  # A few answers are the same.
    assert assistant["content"].startswith("It is ")
    run_here("prepare", out, "--out", tmp_path / "chats", "--tokenizer=bytes")
    assert open_dataset(tmp_path / "chats").train.masked


def test_what_is_solved_is_counted(place: Path) -> None:
    """Of rewards that are known: all, none; of several answers, the same each time, and others by another seed."""
    run = ["--run", place / "run", "--max-new-tokens=4", "--json"]
    echo = [f"--environment={place / 'echo.py'}:Echo", "--n-problems=10"]
    out, _ = run_here("solve", *run, *echo, "--options", 'right=""')
    report = json.loads(out)
    assert (report["reward"], report["pass@1"], report["problems"], report["pass@1_high"]) == (1, 1, 10, 1)
    assert json.loads(run_here("solve", *run, *echo, "--options", "right=zzzzz")[0])["pass@1"] == 0
    several = [*run, *echo, "--options", 'right="1"', "--num-samples=4", "--temperature=1", "--slots=20"]
    first = json.loads(run_here("solve", *several)[0])
    assert first["pass@1"] <= first["pass@4"]
    assert first["answers"] == 40
    assert json.loads(run_here("solve", *several)[0]) == first
    shown = [run_here("solve", *several, "--show=5", f"--seed={seed}")[1] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]


def test_the_table_and_examples_of_answers(place: Path) -> None:
    out, err = run_here("solve", "--run", place / "run", *SUMS, "--n-problems=5", "--max-new-tokens=4", "--show=2")
    assert "pass@1" in out
    assert "95%:" in out
    assert err.count("--- reward ") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name what gives problems and rewards by --environment"),
        ([*SUMS, "--num-samples=2"], "it must be 1 with --temperature 0"),
        ([*SUMS, "--max-new-tokens=17"], "max_new_tokens = 17 is not possible: it must be at most the context of 16"),
        ([*SUMS, "--max-new-tokens=16"], "no problem has a prompt that leaves room for 16 new tokens"),
        (["--environment=arithmetik"], "there is no environment 'arithmetik'; did you mean arithmetic?"),
        ([*SUMS, "--n-problems=0"], "n_problems = 0 is not possible"),
    ],
)
def test_what_is_refused(place: Path, flags: list[str], message: str) -> None:
    assert message in refused_here("solve", "--run", place / "run", *flags)


def test_examples_that_are_refused(place: Path, tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'out.jsonl'}"
    assert (
        "problem 0 of train: the environment arithmetic: there is no label, only expression, answer: name one"
        in refused_here("examples", *SUMS, out, "--field=label")
    )
    assert "there is no folder" in refused_here("examples", *SUMS, "--out=nowhere/x.jsonl")
    assert "a text with {answer} in it" in refused_here("examples", *SUMS, out, "--template=x")
    assert not (tmp_path / "out.jsonl").exists()
