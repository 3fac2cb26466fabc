"""The part `serve` of the benchmarks, with small models and with stand-ins for llama.cpp's programs. Needs torch."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import llama_cpp, serve
from benchmarks.results import Results
from benchmarks.worker import FailedError
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from tests.interop.models import LLAMA, publish

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_contestants")]

TINY = ModelConfig(vocab_size=128, context_length=256, n_layer=1, n_head=2, d_model=32, dtype="float32")
MACHINE = {"platform": "cpu", "versions": {}, "flags": {}, "name": "test", "cores": 2}
CASE = serve.Case(batch=2, prompt=1, new=4)

PROGRAM = """#!{python}
import json, sys
if "broken" in sys.argv[2]:
    sys.exit("error: no such model")
print("some words" if "--output-format" in sys.argv else "")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
found = {{"avg_ns": 2e9 if options.get("-n") == "0" else 4e9, "t_tg": 0.5}}
print(json.dumps(found if "--output-format" in sys.argv else [found]))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that print what llama.cpp's do."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in llama_cpp.PROGRAMS:
        (folder / name).write_text(PROGRAM.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.exhaustive
def test_many_requests_have_the_same_answers_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven requests, so that the last batch has empty slots."""
    monkeypatch.setattr(serve, "REQUESTS", 11)
    monkeypatch.setattr(serve, "PROMPTS", (3, 40))
    monkeypatch.setattr(serve, "ANSWERS", (2, 40))
    row = serve.serve_requests(TINY, "cpu", rounds=2)
    assert set(row["contestants"]) == {"gpt_jax", "gpt_jax, in batches", "transformers"}
    assert row["parity"] == {"gpt_jax, in batches": {"tokens": 0.0}, "transformers": {"tokens": 0.0}}
    assert set(row["times_as_fast"]) == set(row["parity"])
    assert row["failed"] == {}
    assert row["rounds"] == 2


def test_the_requests_are_always_the_same() -> None:
    asked = serve.requests(128)
    assert asked == serve.requests(128)
    prompts, answers = zip(*((len(prompt), new) for prompt, new in asked), strict=True)
    assert len(asked) == 64
    assert 16 <= min(prompts) < 32 < 256 < max(prompts) <= 512
    assert 8 <= min(answers) < 16 < 128 < max(answers) <= 256


def test_no_parity_no_timing() -> None:
    with pytest.raises(
        UserError, match=r"gpt_jax and transformers do not compute the same.*: tokens differ by 5\.0e-01"
    ):
        serve.check_answers("float32", {"gpt_jax": [[1, 2]], "transformers": [[1, 3]]})


@pytest.mark.exhaustive
def test_a_history_that_was_read_before_gives_the_same_first_token() -> None:
    model = dataclasses.replace(LLAMA, context_length=256, dtype="float32")
    row = serve.answer_chat(model, serve.Chat(history=130, turn=3, new=4), rounds=1)
    assert set(row["contestants"]) == {"gpt_jax", "gpt_jax, nothing cached"}
    assert all(found["first_token_ms"]["median"] > 0 for found in row["contestants"].values())
    assert set(row["times_as_fast"]) == {"gpt_jax, nothing cached"}


@pytest.mark.exhaustive
def test_a_model_is_compared_with_llama_cpp_where_it_is(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "model")
    row = serve.read_file(tmp_path / "model", CASE, MACHINE, programs, rounds=1)
    assert row["contestants"]["llama.cpp"]["tokens_per_second"]["median"] == 16
    assert row["contestants"]["gpt_jax"]["tokens_per_second"]["median"] > 0

    (programs / "llama-bench").unlink()
    monkeypatch.setattr(serve, "FROM_FILE", {})
    monkeypatch.setattr(serve, "times", lambda contest, *_: {"contestants": contest.contestants})
    row = serve.read_file(tmp_path / "model", CASE, MACHINE, programs, rounds=1)
    assert row["contestants"] == {}
    assert row["notes"] == [f"llama.cpp: not here: llama-bench in {programs}"]


def test_what_llama_cpp_says_is_understood(programs: Path) -> None:
    found = llama_cpp.find_programs(programs)
    cases: list[tuple[serve.Case, float]] = [
        (serve.CASES["batch 1"], 4.0),
        (serve.CASES["reading 512 tokens"], 2.0),
        (serve.CASES["batch 8"], 0.5),
    ]
    for case, seconds in cases:
        assert llama_cpp.seconds(found, "model", 2, **case._asdict()) == seconds
    with pytest.raises(FailedError, match=r"ended with status 1: error: no such model"):
        llama_cpp.seconds(found, "broken", 2, **CASE._asdict())
    for name in llama_cpp.PROGRAMS:
        (programs / name).write_text("#!/bin/sh\necho '{}'\n")
    for case, _ in cases:
        with pytest.raises(FailedError, match="its benchmark says nothing of"):
            llama_cpp.seconds(found, "model", 2, **case._asdict())


def test_what_is_not_here_is_told_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> dict[str, Any]:
        return {"contestants": {}}

    for name in ("serve_requests", "answer_chat", "read_file"):
        monkeypatch.setattr(serve, name, measured)
    results = Results(tmp_path / "test.json", MACHINE)
    serve.run(results, MACHINE, 1)
    assert "llama.cpp: not here: --gguf names no file" in capsys.readouterr().out
    (tmp_path / "a.gguf").touch()
    serve.run(results, MACHINE, 1, [tmp_path / "a.gguf"])
    assert not results.failed
    names = ["requests", "chat", *(f"a, {name}" for name in serve.CASES)]
    assert list(json.loads((tmp_path / "test.json").read_text())["rows"]) == [f"serve/{name}" for name in names]
