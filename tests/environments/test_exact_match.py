"""The prepared problem set as an environment: its prompts, its answers, and sets that have none."""

from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import problems as problems_module
from gpt_jax.data.problems import ProblemFiles
from gpt_jax.data.shards import SPLITS
from gpt_jax.environments.environment import open_environment
from gpt_jax.environments.judges import Judges
from gpt_jax.environments.numbers import last_number
from gpt_jax.errors import UserError
from tests.data.prepared import prepared


def asked(answers: list[Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": answer, **fields} for i, answer in enumerate(answers)]


def test_problems_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems_module, "FIELDS_AT_ONCE", 3)
    data = prepared(tmp_path, asked([str(i) for i in range(20)], note="é\u2028"))
    environment = open_environment("problems", data=str(data.folder))
    n = 0
    for split in SPLITS:
        files, problems = ProblemFiles(data, split), environment.problems(split)
        assert len(problems) == len(files)
        assert [*files.fields()] == [files.problem(i).fields for i in range(len(files))]
        for i in range(len(files)):
            np.testing.assert_array_equal(cast(np.ndarray, problems[i].prompt), files.problem(i).prompt, strict=True)
            assert problems[i].fields == files.problem(i).fields
            n += 1
    assert n == 20


@pytest.mark.parametrize(
    ("right", "options", "rewarded", "not_rewarded"),
    [
        (" Paris\n", [], ["Paris", "\tParis "], ["paris", "It is Paris", "", "Paris."]),
        (42, [], ["42"], ["42.0", "= 42"]),
        (
            "So 3 * 14 = 42.\n#### 42",
            ["last_number=true"],
            ["42", "6 * 7 = 42.", "It is $42.0", "#### 42"],
            ["4 2", "x"],
        ),
        ("#### 1,234", ["last_number=true"], ["1234", "1,234 and", "7\n#### 1234 pears"], ["1,234,5", "1234 #### 5"]),
        ("#### -5", ["last_number=true"], ["-5", "-$5", "= -5", "(-5)"], ["5", "10-5", "1234 ####"]),
        (0, ["last_number=true"], ["0", "-0.00"], ["", "none"]),
    ],
)
def test_rewards(tmp_path: Path, right: Any, options: list[str], rewarded: list[str], not_rewarded: list[str]) -> None:
    data = prepared(tmp_path, asked([right] * 8))
    environment = open_environment("problems", options, str(data.folder))
    problem = environment.problems("train")[0]
    assert [environment.reward(problem, answer) for answer in rewarded] == [1.0] * len(rewarded)
    assert [environment.reward(problem, answer) for answer in not_rewarded] == [0.0] * len(not_rewarded)
    with Judges("problems", options, str(data.folder), 1) as judges:
        assert judges.submit("train", 0, rewarded[-1], problem).result() == 1.0


def test_another_field_may_have_the_answer(tmp_path: Path) -> None:
    data = prepared(tmp_path, asked(["no"] * 8, solution="yes"))
    environment = open_environment("problems", ["field=solution"], str(data.folder))
    problem = environment.problems("val")[0]
    assert [environment.reward(problem, answer) for answer in ("yes", "no")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (None, [], r"has no field 'answer'; it has more: name one with the option field$"),
        (["a"], [], r"has a field 'answer' of type list, which is no text or number$"),
        (True, [], r"has a field 'answer' of type bool, which is no text or number$"),
        (" \n", [], r"has no text in its field 'answer'$"),
        ("12 ####", ["last_number=true"], r"has no number in its field 'answer'$"),
    ],
)
def test_a_set_without_answers_is_refused(tmp_path: Path, answer: Any, options: list[str], message: str) -> None:
    """Also if it is a single one."""
    data = prepared(tmp_path, asked(["7"] * 30 + [answer], more=1))
    where = rf"^the environment problems: {data.folder}: problem \d+ of (train|val) "
    with pytest.raises(UserError, match=where + message):
        open_environment("problems", options, str(data.folder))


def test_a_folder_is_needed_and_one_of_problems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the environment problems: it needs the data folder of a problem set; make "):
        open_environment("problems")
    with pytest.raises(UserError, match=r"^the environment problems: there is no data folder .*nowhere; make it with"):
        open_environment("problems", data=str(tmp_path / "nowhere"))
    texts = prepared(tmp_path, [{"text": f"text {i}"} for i in range(30)])
    with pytest.raises(UserError, match=r"^the environment problems: .* is a text set; its objective is next_token"):
        open_environment("problems", data=str(texts.folder))


@given(
    st.integers(-(10**30), 10**30),
    st.sampled_from(["", ".0", ".50", ".123456789"]),
    st.sampled_from(["{}", "= {}.", "so {},", "**{}**", "7, {}", "{}!\n", "3 - 4 is ${}", "({})", "x={}%"]),
)
def test_the_last_number_of_a_text(n: int, decimals: str, text: str) -> None:
    for written in (f"{n}{decimals}", f"{n:,}{decimals}"):
        assert last_number(text.format(written)) == Decimal(f"{n}{decimals}")


@pytest.mark.parametrize(
    ("text", "number"),
    [("", None), ("one", None), ("-", None), ("12-3", 3), ("x-3", 3), ("(1)-3", 3), ("1,2", 2), ("1,2345", 2345)],
)
def test_what_is_no_sign_and_no_group(text: str, number: int | None) -> None:
    assert last_number(text) == number
