"""Batch jobs: files of prompts, answers as they are ready, and jobs that are stopped, or killed, and go on."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT
from gpt_jax.sample.batch import Answers, Prompt, read_prompts, run_job
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.generate import generate
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny
from tests.commands import refused_here, run, run_here, start
from tests.interop.models import publish

TOKENIZER = ByteTokenizer()
CONFIG = dataclasses.replace(tiny.ONE_LAYER, context_length=64)
SETTINGS = Settings(max_new_tokens=9, filters=Filters(1.3))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(GPT(CONFIG), tiny.uneven_params(CONFIG), 3, n_tokens=TOKENIZER.vocab_size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    publish(folder, dataclasses.replace(tiny.LLAMA, context_length=64))
    return folder


def test_prompts_are_lines_or_objects() -> None:
    assert read_prompts("a b\r\n\n{not json\n", "f", SETTINGS) == [
        Prompt(1, "a b", SETTINGS),
        Prompt(3, "{not json", SETTINGS),
    ]
    lines = [
        '{"prompt": "a", "id": 7, "temperature": 0.5, "stop": ["x"]}',
        "",
        '{"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 3}',
    ]
    first, second = read_prompts("\n".join(lines), "f", SETTINGS)
    assert first.named == {"line": 1, "id": 7, "prompt": "a", "settings": {"temperature": 0.5, "stop": ["x"]}}
    assert first.settings == Settings(9, stop=["x"], filters=Filters(0.5))  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "Hi"}]
    assert second.named == {"line": 3, "messages": messages, "settings": {"max_new_tokens": 3}}
    assert second.settings.max_new_tokens == 3
    assert read_prompts('\ufeff{"prompt": "a"}', "f", SETTINGS) == [Prompt(1, "a", SETTINGS)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("\n \n", "f has no prompts: every line is empty"),
        ('\n{"prompt": "a",}\n\n{"prompt": "b"}', "f, line 2: this is no JSON object, and line 4 is one"),
        ('{"prompt": "a"}\nb', "f, line 2: this is no JSON object, and the first line is one"),
        ('{"prompt": "a"}\n[1]', "f, line 2: this is no JSON object"),
        ('{"text": "a"}', 'f, line 1: a prompt has either "prompt", a text, or "messages"'),
        ('{"prompt": "a", "messages": []}', "f, line 1: a prompt has either"),
        ('{"prompt": 3}', "f, line 1: the prompt is 3, which is no text"),
        ('{"prompt": "\\ud800"}', r"f, line 1: there is half a character, '\\ud800', which is no text"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "f, line 1: there is half a character"),
        ('{"prompt": "a", "id": "\\udfff"}', "f, line 1: there is half a character"),
        ('{"prompt": "a", "id": [NaN]}', "f, line 1: the id has a number that JSON does not have"),
        ('{"prompt": "a", "id": 1e999}', "f, line 1: the id has a number that JSON does not have"),
        ('{"messages": "a"}', "f, line 1: "),
        ('{"prompt": "a", "temprature": 1}', "f, line 1: there is no setting temprature; there are"),
        ('{"prompt": "a", "filters": {}}', "f, line 1: there is no setting filters"),
        ('{"prompt": "a", "temperature": -1}', "f, line 1: temperature = -1 is not possible"),
        ('{"prompt": "a", "top_p": NaN}', "f, line 1: top_p = nan is not possible"),
        ('{"prompt": "a", "stop_ids": [4294967473]}', r"f, line 1: stop_ids = \[4294967473\] is not possible"),
        (f'{{"prompt": "a", "stop_ids": {[1] * 65}}}', "f, line 1: stop_ids = .* at most 64 ids of tokens, each"),
        (f'{{"prompt": "a", "stop": {json.dumps(["x"] * 65)}}}', "f, line 1: stop = '65 strings' is not possible"),
        ('{"prompt": "a", "seed": "1"}', "f, line 1: seed = '1' is not possible: it must be a whole number"),
    ],
)
def test_lines_that_are_no_prompts_are_refused(lines: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(lines, "f", SETTINGS)


def test_a_job_answers_each_prompt_as_it_would_be_alone(engine: Engine) -> None:
    prompts = [Prompt(i, "x" * (i % 7 + 1), dataclasses.replace(SETTINGS, max_new_tokens=i + 1)) for i in range(40)]
    answers = {(a["line"], a["sample"]): a for a in run_job(engine, TOKENIZER, prompts, 2, {(3, 0), (3, 1), (5, 1)})}
    assert answers.keys() == {(i, n) for i in range(40) for n in (0, 1)} - {(3, 0), (3, 1), (5, 1)}
    for i in (0, 5, 39):
        model, params, prompt = engine.model, engine.params, prompts[i]
        expected = generate(model, params, TOKENIZER, [str(prompt.content)], prompt.settings, 2)
        assert answers[i, 0]["tokens"] == expected[0].tokens
        assert i == 5 or answers[i, 1]["tokens"] == expected[1].tokens


def test_a_prompt_that_does_not_fit_ends_the_job_after_those_before_it(engine: Engine) -> None:
    prompts = [Prompt(1, "a", SETTINGS), Prompt(2, "x" * 65, SETTINGS), Prompt(3, "b", SETTINGS)]
    answers = run_job(engine, TOKENIZER, prompts, 1, ())
    assert next(answers)["line"] == 1
    with pytest.raises(UserError, match="line 2: the prompt has 65 tokens, and the model's context_length is 64"):
        next(answers)


def test_settings_that_do_not_fit_the_model_are_told_with_their_line(engine: Engine) -> None:
    biased = dataclasses.replace(SETTINGS, filters=Filters(logit_bias=((10**6, 1.0),)))
    answers = run_job(engine, TOKENIZER, [Prompt(1, "a", SETTINGS), Prompt(2, "b", biased)], 1, ())
    assert next(answers)["line"] == 1
    with pytest.raises(UserError, match="line 2: logit_bias names token 1000000, and the tokenizer has"):
        next(answers)


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # Texts have other ends of lines, too.
    return sorted(map(json.loads, lines), key=lambda a: (a["line"], a["sample"]))


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on(model: Path, tmp_path: Path) -> None:
    """To the answers of one that was not, wherever it was killed, within the line of an answer, too."""
    prompts, whole, out = tmp_path / "prompts.txt", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(100)), encoding="utf-8")
    job = ["sample", "--model", model, "--prompts", prompts, "--max-new-tokens", 16, "--slots", 4]
    run(*job, "--out", whole)
    expected = lines_of(whole)
    assert [answer["line"] for answer in expected] == list(range(1, 101))

    process = start(*job, "--out", out)
    while not out.exists() or out.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    content = out.read_bytes()
    assert content.count(b"\n") < 100
    out.write_bytes(content[:-7])
    run(*job, "--out", out)
    assert lines_of(out) == expected
    _, err = run(*job, "--out", out)
    assert "has all 100 answers already" in err
    assert lines_of(out) == expected


def test_answers_of_another_job_are_left_alone(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\nb\n", encoding="utf-8")
    job = ["sample", "--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 3]
    run_here(*job)
    before = out.read_bytes()
    assert "answers of another model, or of other settings; take another --out" in refused_here(*job, "--seed=1")
    prompts.write_text("a\nc\n", encoding="utf-8")
    assert "answers another prompt, or one with other settings, at line 2; take another --out" in refused_here(*job)
    assert out.read_bytes() == before
    out.write_text("a text\n", encoding="utf-8")
    assert "line 1: this is no answer of such a job; take another --out" in refused_here(*job)
    assert out.read_text(encoding="utf-8") == "a text\n"
    assert "cannot be written: --out is a file, in a folder" in refused_here(*job, f"--out={tmp_path / 'no' / 'out'}")


def test_answers_to_other_settings_of_a_line_and_of_other_weights_are_left_alone(model: Path, tmp_path: Path) -> None:
    prompts, out, there = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "model"
    shutil.copytree(model, there)
    job = ["sample", "--model", there, "--prompts", prompts, "--out", out, "--max-new-tokens", 3]
    lines = ['{"prompt": "a", "id": 7, "top_k": 2}', '{"prompt": "a", "top_k": 2}', '{"prompt": "a", "id": 7}']
    prompts.write_text(lines[0], encoding="utf-8")
    run_here(*job)
    before = out.read_bytes()
    for other in lines[1:]:
        prompts.write_text(other, encoding="utf-8")
        assert "answers another prompt, or one with other settings, at line 1; take another --out" in refused_here(*job)
    prompts.write_text(lines[0], encoding="utf-8")
    _, err = run_here(*job)
    assert "has all 1 answers already" in err
    weights = there / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert "answers of another model, or of other settings" in refused_here(*job)
    assert out.read_bytes() == before


def test_answers_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(tmp_path / "out", "job")
    answers.add({"line": 1, "sample": 0})

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    write: Callable[..., Any] = Path.open
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\); the answers before stay"):
        answers.add({"line": 2, "sample": 0})
    monkeypatch.setattr(Path, "open", write)
    answers.add({"line": 3, "sample": 0})
    assert [answer["line"] for answer in lines_of(tmp_path / "out")] == [1, 3]


def test_without_a_file_answers_are_printed(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "temperature": 0}\n{"prompt": "b", "id": "second"}\n', encoding="utf-8")
    out, _ = run_here("sample", "--model", model, "--prompts", prompts, "--max-new-tokens", 3)
    answers = sorted(map(json.loads, out.split("\n")[:-1]), key=lambda answer: answer["line"])
    assert [answer["prompt"] for answer in answers] == ["a", "b"]
    assert answers[1]["id"] == "second"
    alone, _ = run_here("sample", "--model", model, "--prompt", "a", "--temperature=0", "--json", "--max-new-tokens", 3)
    assert json.loads(alone)["text"] == answers[0]["text"]
