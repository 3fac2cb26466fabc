"""`serve` as a process: it says where it listens, answers, and ends as it is told; and what it refuses."""

import dataclasses
import json
import signal
import socket
from collections import Counter
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest

from gpt_jax.cli.parse import parse
from gpt_jax.cli.serve import ServeArgs, service, what_of_chats
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny
from tests.commands import refused_here, set_up_here
from tests.export.test_streaming import save_run
from tests.interop.models import publish
from tests.serve.processes import served
from tests.serve.servers import running

pytestmark = pytest.mark.usefixtures("quick_commands")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a published model, without a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "small"
    publish(folder, tiny.LLAMA)
    return folder


def test_it_answers_and_finishes_what_runs_when_it_is_told_to_stop(model: Path) -> None:
    with served("--model", model, "--slots=2", "--name=little") as (process, url, lines):
        assert "little, which has no chat template: it continues texts: ready at http://127.0.0.1:" in lines[-1]
        body = {"prompt": [1], "max_tokens": 32, "logit_bias": {}, "n": 64, "stream": True}
        with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=120) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"  # All of it has come.
        ended = {c["index"] for line in rest[:-1] for c in json.loads(line[6:])["choices"] if c["finish_reason"]}
        assert ended == set(range(64))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}health")
        assert process.wait(60) == 0
        assert json.loads(lines[-1])["completion_tokens"] > 64


def test_ctrl_c_ends_it_and_what_takes_longer_than_it_may_is_cut(model: Path) -> None:
    with served("--model", model, "--slots=1", "--grace=0") as (process, url, lines):
        body = {"prompt": [1], "max_tokens": 32, "n": 64, "stream": True}
        with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=120) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGINT)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["error"]["code"] == "stopped"
        assert process.wait(60) == 0
        assert not any("Traceback" in line for line in lines), lines


def test_wrong_arguments_are_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    empty, spaced = tmp_path / "empty", tmp_path / "spaced"
    empty.write_text("# no key\n\n")
    spaced.write_text("a key\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for args, words in (
            ([f"--port={port}"], f"127.0.0.1, port {port}: Address already in use; is another server running?"),
            (["--port=65536"], "port = 65536 is not possible"),
            (["--host=0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: add --api-key-file FILE, or --open"),
            (["--host=nowhere.invalid", "--open"], "nowhere.invalid, port 0"),
            ([f"--api-key-file={empty}"], "has no keys; write one a line"),
            ([f"--api-key-file={spaced}"], "key 1 has characters that no header can carry"),
            (["--api-key-file=nowhere"], "nowhere: No such file or directory"),
            ([f"--api-key-file={spaced}", "--open"], "use one of them"),
            (["--slots=0"], "slots = 0 is not possible"),
            (["--chunks-a-turn=0"], "chunks_a_turn = 0 is not possible"),
            (["--queue=-1"], "queue = -1 is not possible"),
            (["--adapter", "x"], "--adapter x is not of the form NAME=RUN"),
            (["--adapter", "small=x"], "another model is called small already"),
            (["--adapter", f"x={model}"], f"{model} has no adapters"),
        ):
            assert words in refused_here("serve", "--model", model, "--port=0", *args)
    assert "nowhere is not a run" in refused_here("serve", "--run=nowhere")


@pytest.mark.slow
def test_a_mesh_answers_as_one_device_does(tmp_path: Path) -> None:
    """Over HTTP, with a model of which no device holds much more than half."""
    config = dataclasses.replace(tiny.ONE_LAYER, vocab_multiple=2)
    save_run(tmp_path / "run", config, tiny.uneven_params(config))
    answers = []
    for parallel, n in (("--parallel.devices=1", 1), ("--parallel.tensor=2", 2)):
        args = parse(ServeArgs, [f"--run={tmp_path / 'run'}", "--slots=2", parallel], "serve")
        with set_up_here():
            loaded = service(args)
        with running(loaded) as server:
            [choice] = server.post("/v1/completions", prompt="on", max_tokens=12, temperature=0, logprobs=1)["choices"]
            answers.append(choice["logprobs"])
            params = jax.tree.leaves(server.engine.params)
            held: Counter[jax.Device] = Counter()
            for shard in (shard for x in params for shard in x.addressable_shards):
                held[shard.device] += shard.data.nbytes
        assert len(held) == n
        assert max(held.values()) < 1.1 / n * sum(x.nbytes for x in params)
    alone, divided = answers
    assert len(set(alone["tokens"])) > 1
    assert divided["tokens"] == alone["tokens"]
    np.testing.assert_allclose(divided["token_logprobs"], alone["token_logprobs"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, ", which has no chat template: it continues texts"),
        ("{{ messages", ", whose chat template cannot be used (unexpected end of template"),
        ("{{ messages }}", ""),
    ],
)
def test_what_keeps_a_model_from_chatting_is_said_at_the_start(template: str | None, said: str) -> None:
    tokenizer = ByteTokenizer().with_chat_template(template)
    assert what_of_chats(tokenizer).startswith(said)
    assert bool(what_of_chats(tokenizer)) == bool(said)
