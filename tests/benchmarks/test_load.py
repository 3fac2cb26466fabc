"""The part `load` of the benchmarks, with a small server in the place of all of them."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, servers, tables
from benchmarks.__main__ import main
from benchmarks.results import Results
from benchmarks.servers import Answer, How, Server
from benchmarks.worker import FailedError
from gpt_jax.errors import UserError
from gpt_jax.run.load import open_source
from tests.benchmarks.streaming import PAUSE, WORD, Handler, Streaming
from tests.interop.models import publish

MACHINE = {"platform": "cpu", "versions": {}, "flags": {}, "name": "test", "cores": 2}
STREAMING = How((sys.executable, "-m", "tests.benchmarks.streaming"), {}, {})
BROKEN = How((sys.executable, "-c", "raise SystemExit('no such model')"), {}, {})


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is there at once, in the place of Python's documentation."""
    words = " ".join(str(i) for i in range(20_000))
    monkeypatch.setattr(load, "documentation", lambda: words)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A client of a server in this process."""
    with Streaming((servers.HOST, 0), Handler) as streaming:
        threading.Thread(target=streaming.serve_forever).start()
        client = Server(STREAMING, tmp_path_factory.mktemp("caches"))
        client.port, client.model = streaming.server_port, "a model"
        yield client
        streaming.shutdown()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work than in earnest."""
    for name, value in {"REQUESTS": 4, "ANSWERS": (2, 4), "WARM_UP": 2, "REPLY": 3}.items():
        monkeypatch.setattr(load, name, value)


def test_the_requests_are_always_the_same_and_no_texts_are_read_twice() -> None:
    asked, others = load.requests(500, 0), load.requests(500, 1)
    assert asked == load.requests(500, 0)
    assert len({request.prompt for request in asked + others}) == 2 * len(asked) == 128
    lengths, of_others = ([(len(prompt), new) for prompt, new in of] for of in (asked, others))
    assert lengths == of_others
    prompts, answers = zip(*lengths, strict=True)
    assert 64 <= min(prompts) < 128 < 1000 < max(prompts) <= 2000
    assert 8 <= min(answers) < 16 < 128 < max(answers) <= 256


def test_requests_arrive_at_the_rate() -> None:
    at = load.arrivals(2.0)
    assert at == load.arrivals(2.0) == sorted(at)
    assert (len(at), at[-1]) == (64, pytest.approx(32))
    np.testing.assert_allclose(load.arrivals(0.5), 4 * np.array(at))


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "x"])
def test_a_rate_is_more_than_0(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["load", "--rates", "1", given])
    assert "argument --rates: " in capsys.readouterr().err


@pytest.mark.parametrize("part", ["load", "serve"])
def test_a_model_that_is_not_there_is_an_error(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([part, "--gguf", str(tmp_path / "no.gguf"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: --gguf {tmp_path / 'no.gguf'}: there is no such file\n"


def test_statistics_are_those_of_the_answers() -> None:
    """Of 101 answers, the first tokens take 0 to 100 ms, and the other nine of each as long together."""
    answers = [Answer("", ms / 1000, 2 * ms / 1000, 10, 5) for ms in range(101)]
    found = load.statistics(answers, 20)
    assert found == pytest.approx(
        {
            "tokens_per_second": 50.5,
            "first_token_ms": 50,
            "first_token_ms_p99": 99,
            "token_ms": 50 / 9,
            "token_ms_p99": 11,
            "answer_seconds": 0.1,
        }
    )


def test_a_client_sees_when_an_answer_comes(server: Server) -> None:
    due = time.perf_counter() - 5  # What a request waits to be sent counts, too.
    answer = server.ask("/v1/completions", due=due, prompt="abc", max_tokens=4)
    assert answer[0] == 4 * WORD
    assert answer.first > 5 + PAUSE
    assert answer.seconds - answer.first > 2 * PAUSE
    assert answer[3:] == (4, 3)
    messages = [{"role": "user", "content": "abc"}]
    assert server.ask("/v1/chat/completions", messages=messages, max_tokens=2).text == 2 * WORD


def test_what_is_no_answer_is_told(server: Server, tmp_path: Path) -> None:
    reasons = {
        "refused": r'status 400: .*"no such field"',
        "broken": "error: .*out of memory",
        "short": "an answer has 3 tokens in place of 4",
    }
    for prompt, reason in reasons.items():
        with pytest.raises(FailedError, match=reason):
            server.ask("/v1/completions", prompt=prompt, max_tokens=4)
    nobody = Server(STREAMING, tmp_path)
    nobody.port = 1
    with pytest.raises(FailedError, match="ConnectionRefusedError"):
        nobody.ask("/v1/completions", prompt="abc", max_tokens=4)


def test_failures_are_counted_and_nothing_is_sent_early(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [load.Request(prompt, 3) for prompt in ("a", "short", "b")]
    found = load.measure(server, asked, [0.0, 0.1, 0.5])
    assert found["failed"] == 1
    assert 0 < found["tokens_per_second"] < 6 / 0.5
    assert "1 failed, the first of them: an answer has 2 tokens in place of 3\n" in capsys.readouterr().out
    with pytest.raises(FailedError, match="2 tokens in place of 3"):
        load.measure(server, asked[1:2], [0.0])


def test_a_server_is_stopped_while_it_is_not_its_turn(tmp_path: Path) -> None:
    processes = []
    with Server(STREAMING, tmp_path) as started:
        for _ in range(2):
            with started.awake():
                assert started.ask("/v1/completions", prompt="abc", max_tokens=1).text == WORD
            process = started.process
            assert process is not None
            processes.append(process)
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":  # It takes a moment.
                time.sleep(0.01)
        assert started.memory("VmRSS") > 2**20
    assert processes[0] is processes[1]
    assert processes[0].returncode is not None


def test_all_questions_are_asked_and_written_down(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    float32 = {"gpt_jax": STREAMING, "llama.cpp": STREAMING, "transformers": BROKEN}
    contestants = {"float32": float32, "8 bits": {"gpt_jax, int8": BROKEN, "llama.cpp, Q8_0": STREAMING}}
    monkeypatch.setattr(load.Models, "contestants", contestants)
    (tmp_path / "a.gguf").touch()
    results = Results(tmp_path / "test.json", MACHINE)
    load.run(results, MACHINE, 2, [tmp_path / "a.gguf"], tmp_path, rates=[20.0])
    said = capsys.readouterr().out
    assert f"llama.cpp: not here: llama-server and llama-quantize in {tmp_path}\n" in said
    assert "not measured: gpt_jax, int8 failed: ended with status 1: no such model\n" in said

    content = json.loads((tmp_path / "test.json").read_text())
    kinds = ("requests/a, {}, 20 a second", "chat/a, {}", "start/a, {}, empty caches", "start/a, {}, filled caches")
    assert list(content["rows"]) == [f"load/{kind.format('float32')}" for kind in kinds]
    assert results.failed == [f"load/{kind.format('8 bits')}" for kind in kinds]
    for row in content["rows"].values():
        assert (row["rounds"], list(row["contestants"])) == (2, ["gpt_jax", "llama.cpp"])
        assert list(row["times_as_fast"]) == ["llama.cpp"]
        assert row["failed"] == {"transformers": "ended with status 1: no such model"}
    requests, chat, start, _ = (row["contestants"]["gpt_jax"] for row in content["rows"].values())
    assert requests["failed"] == {"median": 0, "min": 0, "max": 0}
    assert requests["peak_bytes"]["median"] >= requests["resident_bytes"]["median"] > 2**20
    assert chat["turn_1_ms"]["median"] > 1e3 * PAUSE
    assert chat["prompt_tokens"]["median"] > 8 * load.MESSAGE
    assert start["ready_seconds"]["median"] < start["seconds"]["median"]

    text = "\n".join(tables.load(content["rows"]))
    assert "| a, float32, 20 a second | gpt_jax | " in text
    assert "|  | transformers | failed | " in text
    assert "| turn 1 | turn 2 | " in text
    assert "| a, float32, filled caches | gpt_jax | " in text


def test_answers_that_differ_are_not_timed() -> None:
    ours = [Answer("the same words at first, then others", 1, 2, 3, n) for n in (4, 5)]
    alike = [answer._replace(text="the same words at first, and then") for answer in ours]
    one = [alike[0], alike[1]._replace(text="another text")]
    assert load.check_answers(ours, {"llama.cpp": alike, "transformers": one}) == {
        "llama.cpp": {"prompt tokens": 0, "answers": 0},
        "transformers": {"prompt tokens": 0, "answers": 0.5},
    }
    with pytest.raises(UserError, match=r"gpt_jax and transformers do not .*: answers differ by 1.0e\+00"):
        load.check_answers(ours, {"transformers": [answer._replace(text="another text") for answer in ours]})
    with pytest.raises(UserError, match=r"prompt tokens differ by 1.0e\+00"):
        load.check_answers(ours, {"llama.cpp": [alike[0], alike[1]._replace(prompt_tokens=6)]})


def test_models_are_converted_once(tmp_path: Path) -> None:
    programs, folder = tmp_path / "programs", tmp_path / "models"
    programs.mkdir()
    folder.mkdir()
    for name in ("llama-server", "llama-quantize"):
        (programs / name).write_text('#!/bin/sh\necho "$4" >> "$3"\n')
        (programs / name).chmod(0o755)
    models = load.Models(tmp_path / "a.gguf", programs, folder, 2)
    assert models.notes == []
    assert [models.as_type("Q8_0").read_text() for _ in range(2)] == ["Q8_0\n"] * 2
    assert [path.name for path in folder.iterdir()] == ["a.Q8_0.gguf"]


def test_every_server_has_the_same_sizes(tmp_path: Path) -> None:
    publish(tmp_path / "model")
    servers.write_for_transformers(tmp_path / "model", tmp_path / "written")
    written, source = open_source(str(tmp_path / "written")), open_source(str(tmp_path / "model"))
    assert written.config == source.config
    assert json.loads((tmp_path / "written" / "generation_config.json").read_text()) == {}

    own = servers.ours(tmp_path / "model", 8, 2048, "--quantize", "int8")
    assert own.command[1:4] == ("-m", "gpt_jax", "serve")
    assert own.command[-6:] == ("--slots", "8", "--context-length", "2048", "--quantize", "int8")
    assert own.endless == {"logit_bias": {str(stop): -100 for stop in source.tokenizer().stop_ids}}
    theirs = servers.llama_server("llama-server", tmp_path / "a.gguf", 8, 2048, 2)
    assert theirs.command[5:] == ("--parallel", "8", "--ctx-size", "16384", "--threads", "2")
    assert servers.transformers_serve(tmp_path, 8, 2048, 2).command[-2:] == ("--cb-num-blocks", "64")
