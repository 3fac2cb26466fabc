"""Tasks of reasoning-gym: the same problems in every process, and its own scores."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from gpt_jax.data.shards import SPLITS
from gpt_jax.environments.environment import open_environment
from gpt_jax.environments.judges import Judges
from gpt_jax.environments.reasoning_gym import BY_HASH_ORDER, HOW_TO_ANSWER, ReasoningGym, tasks
from gpt_jax.errors import UserError
from tests.commands import ROOT


def content(environment: Any, split: Any, number: int) -> str:
    [message] = environment.problems(split)[number].prompt
    assert message["role"] == "user"
    return str(message["content"])


def test_problems_are_those_of_the_task() -> None:
    tagged, plain = (
        open_environment("reasoning-gym:chain_sum", ["max_terms=3", f"tags={tags}"]) for tags in ("true", "false")
    )
    for i in (5, 0, 99_999):
        question = tagged.problems("train")[i].fields["question"]
        assert content(plain, "train", i) == question
        assert content(tagged, "train", i) == f"{question}\n\n{HOW_TO_ANSWER}"
        assert tagged.problems("train")[i].fields["metadata"]["num_terms"] <= 3
    assert [len(tagged.problems(split)) for split in ("train", "val")] == [100_000, 1000]


def test_splits_and_seeds_differ() -> None:
    """Also where one seed is the next one of another, since the tasks seed problem i with seed + i."""
    environment = ReasoningGym("products", n_train=300, n_val=300, min_digits=3)
    train, val = ({content(environment, split, i) for i in range(300)} for split in ("train", "val"))
    assert len(train | val) == 600
    assert content(ReasoningGym("products", seed=1, min_digits=3), "train", 0) in train


QUESTIONS = """
import json, os, sys
from gpt_jax.environments.reasoning_gym import ReasoningGym
asked = []
for task in sys.argv[1:]:
    problems = ReasoningGym(task, n_train=100, evaluates=True).problems("train")
    by_number = {i: problems[i].prompt for i in (99, 0, 3)[:: int(os.environ["STEP"])]}
    asked.append([by_number[i] for i in sorted(by_number)])
print()  # Some tasks print dots.
print(json.dumps(asked))
"""


def questions(hash_seed: int, *tasks: str, step: int = 1) -> Any:
    """The prompts of some problems of each task, asked for in an order of this step."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "STEP": str(step)}
    command = [sys.executable, "-c", QUESTIONS, *tasks]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_problems_are_the_same_in_every_process() -> None:
    """Of all tasks but those that are known to differ."""
    names = [task for task in tasks() if task not in (*BY_HASH_ORDER, "acre")]  # acre takes long to start.
    for task, *asked in zip(names, questions(1, *names), questions(2, *names, step=-1), strict=True):
        assert asked[0] == asked[1], task


def test_tasks_that_differ_need_a_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert questions(1, "ransom_note") == questions(1, "ransom_note", step=-1) != questions(2, "ransom_note")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match=r"^ransom_note makes other problems in every process; set PYTHONHASHSEED=0"):
        ReasoningGym("ransom_note")


def test_the_final_answer_is_scored() -> None:
    tagged, plain = ReasoningGym("chain_sum"), ReasoningGym("chain_sum", tags=False)
    problem = tagged.problems("train")[0]
    right = problem.fields["answer"]
    for answer in (f"<answer>{right}</answer>", f"<answer>1</answer> no, <answer>\n{right} </answer>."):
        assert tagged.reward(problem, answer) == 1.0
    for answer in (right, f"<answer>{right}", f"{right}</answer>", "</answer><answer>", ""):
        assert tagged.reward(problem, answer) == 0.0
    assert plain.reward(problem, f" {right}\n") == 1.0
    assert plain.reward(problem, f"<answer>{right}</answer>") < 1.0


@pytest.mark.slow
def test_every_task_gives_all_for_its_own_answer() -> None:
    """And from 0 to 1 for anything else; a problem stays as it is."""
    for task in tasks():
        if task in (*BY_HASH_ORDER, "acre"):
            continue
        environment = ReasoningGym(task, n_train=100, n_val=100, evaluates=True)
        for split in SPLITS:
            problem = environment.problems(split)[0]
            before = repr(problem)
            for text in ("", "zz", "\ud800(", "[1, 2]", "0"):
                assert 0 <= environment.reward(problem, f"<answer>{text}</answer>") <= 1, task
            own = problem.fields["answer"]
            assert own is None or environment.reward(problem, f"<answer>{own}</answer>") == 1.0, task
            assert repr(problem) == before, task


def test_a_text_that_the_task_cannot_read_gets_nothing() -> None:
    environment = ReasoningGym("prime_factorization")
    problem = environment.problems("val")[0]
    assert environment.reward(problem, "<answer>two times three</answer>") == 0.0
    assert environment.reward(problem, f"<answer>{problem.fields['answer']}</answer>") == 1.0


def test_processes_judge_the_same() -> None:
    environment = open_environment("reasoning-gym:countdown", ["n_val=9", "evaluates=true"])
    problems = environment.problems("val")
    answers = [f"<answer>{problems[i].fields['answer'] if i % 2 else '1 + 1'}</answer>" for i in range(9)]
    with Judges("reasoning-gym:countdown", ["n_val=9", "evaluates=true"], "", 2) as judges:
        futures = [judges.submit("val", i, answer, problems[i]) for i, answer in enumerate(answers)]
        assert [f.result() for f in futures] == [environment.reward(problems[i], a) for i, a in enumerate(answers)]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chain_sums", [], "reasoning-gym has no task 'chain_sums'; did you mean chain_sum or "),
        ("qqqq", [], "reasoning-gym has no task 'qqqq'; there are ab, acre, "),
        ("composite", [], "reasoning-gym has no task 'composite'; "),
        ("chain_sum", ["max_term=3"], "there is no option max_term; did you mean max_terms"),
        ("chain_sum", ["size=3"], "there is no option size; it takes tags, n_train, n_val, seed, evaluates, min_terms"),
        ("chain_sum", ["task=ab"], "there is no option task; "),
        ("chain_sum", ["tags=1"], "tags = 1 is not possible: it must be true or false"),
        ("chain_sum", ["n_val=0"], "n_val = 0 is not possible: it must be 1 to 1,073,741,824"),
        ("chain_sum", ["seed=-1"], "seed = -1 is not possible: it must be 0 to 1,073,741,824"),
        (
            "chain_sum",
            ["max_terms=1"],
            "the task chain_sum does not work with these options: AssertionError: ",
        ),
        ("countdown", [], "countdown runs what the model answers as Python; allow it by the option evaluates=true"),
        ("countdown", ["evaluates=1"], "evaluates = 1 is not possible: it must be true or false"),
        ("chain_sum", ["max_terms=two"], "the task chain_sum does not work with these options: TypeError: "),
    ],
)
def test_what_is_refused(task: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        open_environment(f"reasoning-gym:{task}", options)
    assert str(e.value).startswith(f"the environment reasoning-gym:{task}: {message}")
    assert "\n" not in str(e.value)
