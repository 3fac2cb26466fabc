"""Problems of arithmetic: each a function of its number, in one split alone, and right answers alone rewarded."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.environments.arithmetic import Arithmetic, split_of
from gpt_jax.errors import UserError

subsets = st.sampled_from(["".join(s) for n in (1, 2, 3) for s in itertools.permutations("+-*", n)])
environments = st.builds(
    Arithmetic,
    operations=subsets,
    digits=st.integers(1, 9),
    terms=st.integers(2, 9),
    n_train=st.integers(1, 60),
    n_val=st.integers(1, 60),
    seed=st.integers(-3, 2**70),
    chat=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(environments)
def test_problems_are_as_the_options_say(environment: Arithmetic) -> None:
    for split, n in (("train", environment.n_train), ("val", environment.n_val)):
        problems = environment.problems(split)  # type: ignore[arg-type]
        in_order = [problems[i] for i in range(len(problems))]
        assert len(in_order) == n
        assert [problems[i] for i in reversed(range(n))] == in_order[::-1]
        for problem in in_order:
            expression = problem.fields["expression"]
            assert eval(expression) == problem.fields["answer"]
            assert split_of(expression) == split
            operations = [c for c in expression if not c.isdigit()]
            assert len(operations) == environment.terms - 1
            assert {*operations} <= {*environment.operations}
            asked = [{"role": "user", "content": f"What is {expression}?"}]
            assert problem.prompt == (asked if environment.chat else f"{expression}=")


@settings(max_examples=60, deadline=None)
@given(environments, st.integers(-(10**20), 10**20))
def test_the_right_answer_alone_is_rewarded(environment: Arithmetic, wrong: int) -> None:
    problem = environment.problems("train")[0]
    right = problem.fields["answer"]
    for number in (right, wrong):
        answers = [f"{number}", f" {number} ", f"{number}\n1+1=2"]
        if environment.chat:
            answers = [f"{number}", f"It is 17 and so {number}.", f"= {number:,}", f"12+3=**{number}**\n"]
        assert [environment.reward(problem, answer) for answer in answers] == [float(number == right)] * len(answers)
    for answer in ("", "x", "\n", f"{right} or {right + 1}"):
        assert environment.reward(problem, answer) == 0.0


@pytest.mark.parametrize("answer", ["042", "+42", "42.0", "4 2", "=42", "42!", "\n42", "\uff14\uff12"])
def test_a_text_must_be_exactly_the_number(answer: str) -> None:
    environment = Arithmetic(n_train=4000)
    problems = environment.problems("train")
    problem = next(problems[i] for i in range(4000) if problems[i].fields["answer"] == 42)
    assert (environment.reward(problem, answer), environment.reward(problem, "42")) == (0.0, 1.0)


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_even_the_fewest_expressions_are_in_both_splits(operation: str) -> None:
    """So that each problem is found."""
    expressions = [f"{a}{operation}{b}" for a in range(10) for b in range(10)]
    n_val = sum(split_of(expression) == "val" for expression in expressions)
    assert 0 < n_val < 50
    environment = Arithmetic(operation, digits=1, n_train=3000, n_val=3000)

    def drawn(problems: Sequence[Any]) -> set[str]:
        return {problems[i].fields["expression"] for i in range(len(problems))}

    assert len(drawn(environment.problems("val"))) == n_val
    assert len(drawn(environment.problems("train"))) == 100 - n_val


def test_seeds_and_splits_draw_other_problems() -> None:
    first = [Arithmetic(digits=9, seed=seed).problems("train")[0] for seed in range(3)]
    assert len({problem.prompt for problem in first}) == 3


def test_problems_stay_what_they_are() -> None:
    """They are part of what a run with rewards is a function of."""
    assert [Arithmetic().problems("train")[i].prompt for i in range(3)] == ["92+38=", "87-58=", "63-10="]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ""}, "operations = '' is not possible: it must be some of + - *, each once"),
        ({"operations": "++"}, "operations = '++' is not possible: it must be some of + - *, each once"),
        ({"operations": "/"}, "operations = '/' is not possible: it must be some of + - *, each once"),
        ({"digits": 0}, "digits = 0 is not possible: it must be 1 to 9"),
        ({"digits": 2.5}, "digits = 2.5 is not possible: it must be of type int"),
        ({"terms": 1}, "terms = 1 is not possible: it must be 2 to 9"),
        ({"n_train": 0}, "n_train = 0 is not possible: it must be at least 1"),
        ({"n_val": -1}, "n_val = -1 is not possible: it must be at least 1"),
        ({"chat": "True"}, "chat = 'True' is not possible: it must be of type bool"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as e:
        Arithmetic(**options)
    assert str(e.value) == message


@pytest.mark.parametrize("number", [-1, 5])
def test_no_problems_besides(number: int) -> None:
    with pytest.raises(IndexError):
        Arithmetic(n_train=5).problems("train")[number]
