"""`prepare --engine ray`: the files of the default engine, whoever dies, and what is said when there is no cluster."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.cli.prepare import command
from gpt_jax.config import CleanConfig
from gpt_jax.data import cleaned as cleaned_module
from gpt_jax.data import formats
from gpt_jax.data import texts as texts_module
from gpt_jax.data import tuning as tuning_module
from gpt_jax.data.engines import open_engine
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import SplitWriter
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer

ray = pytest.importorskip("ray")

WORDS = ["the", "model", "写", "learns\n", "▁", "🙂", "  indented", "2024", "<|endoftext|>"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One of four cores, whatever this machine has. Ray sets variables of this process, which other tests are not to
    have: a cluster by another one would ask for a token."""
    environment = dict(os.environ)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (texts_module, tuning_module, cleaned_module):
        monkeypatch.setattr(module, "TASK_BYTES", 2000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 500)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts.jsonl, some of them twice, and chat.jsonl."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 200)))

    texts = [text() for _ in range(150)]
    chats = [[{"role": role, "content": text()} for role in ("user", "assistant")] for _ in range(150)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts + texts[:50]))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    return folder


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sentencepiece": ("texts.jsonl", {"vocab_size": 320}),
    "bytes": ("texts.jsonl", {"tokenizer": "bytes"}),
    "conversations": ("chat.jsonl", {"vocab_size": 320}),
    "cleaning": ("texts.jsonl", {"tokenizer": "bytes", "clean": CleanConfig(normalize="nfkc", dedup="exact")}),
}


def prepared(sources: Path, case: str, out: Path, **settings: Any) -> dict[str, bytes]:
    """The files of the folder, by their names."""
    file, options = CASES[case]
    prepare(PrepareArgs(source=(str(sources / file),), out=out, **options, **settings))
    return {path.name: path.read_bytes() for path in out.iterdir()}


def command_lines() -> dict[int, bytes]:
    """Those of all processes on this machine."""
    found = {}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It has just ended.
            found[int(process.parent.name)] = process.read_bytes()
    return found


def actors() -> list[int]:
    """The processes of our actors, once they are made."""
    lines = command_lines()
    return [pid for pid in lines if lines[pid].startswith(b"ray::PrepareActor") and b"__init__" not in lines[pid]]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def killing(function: Callable[..., Any], calls: int, killed: list[int]) -> Callable[..., Any]:
    """The function, which at one of its calls kills an actor."""
    left = calls

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)
        return function(*args, **kwargs)

    return changed


@pytest.mark.usefixtures("many_tasks")
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_the_default_engine(
    sources: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For any number of workers, of which one is killed."""
    expected = prepared(sources, case, tmp_path / "local")
    place, name = (cleaned_module, "verdicts") if case == "cleaning" else (SplitWriter, "write")
    for workers in (1, 2, 4):
        killed = list[int]()
        wait_for(lambda: not actors())
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killing(getattr(place, name), 10, killed))
            assert prepared(sources, case, tmp_path / f"ray-{workers}", engine="ray", workers=workers) == expected
        assert killed
        out, err = capfd.readouterr()
        assert re.search(r"^a worker on the Ray cluster died \(.+\); another one is started$", err, re.MULTILINE)
        assert out == ""


def test_more_workers_than_cores_wait_in_vain(sources: Path, tmp_path: Path) -> None:
    expected = prepared(sources, "bytes", tmp_path / "local")
    assert prepared(sources, "bytes", tmp_path / "ray", engine="ray", workers=6) == expected


def test_workers_need_no_folder_of_this_machine(tmp_path: Path) -> None:
    """They are sent the tokenizer with all its files."""
    tokenizer = ByteTokenizer().with_chat_template("{{ messages[0].content }}")
    lines = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": None}).encode()
    with open_engine("local", 1) as engine, engine("chat", tokenizer.save(tmp_path)) as pool:
        expected = [*pool.encode([(0, lines)])]
    with open_engine("ray", 1) as engine:
        made = engine("chat", tokenizer.save(tmp_path))
        for path in tmp_path.iterdir():
            path.unlink()
        with made as pool:
            assert [*pool.encode([(0, lines)])] == expected


def test_a_worker_that_cannot_be_made_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        open_engine("ray", 2) as engine,
        pytest.raises(UserError, match=r"\(KeyError: 'none'\), number 3 of the workers"),
        engine("none", "") as pool,
    ):
        [*pool.encode([(0, b"")])]


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--engine ray needs Ray: pip install 'gpt-jax\[ray\]'$"):
        prepare(PrepareArgs(source=("python-docs",), out=tmp_path / "out", engine="ray"))
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nowhere.invalid:6379", "ray://127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_named(address: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # Nobody listens there afterwards.
    process = start(tmp_path / "out", RAY_ADDRESS=address.format(port=port))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith(f"error: no Ray cluster answers at RAY_ADDRESS = {address.format(port=port)} (")
    assert len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


def start(out: Path, *flags: str, **variables: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "gpt_jax", "prepare", "python-docs", "--out", str(out), "--engine", "ray", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    """While the vocabulary is trained, with a cluster of its own running; and it leaves none."""
    folder = tempfile.mkdtemp()  # The names of sockets, which are in it, have an upper length.
    process = start(tmp_path / "out", "--workers", "1", RAY_TMPDIR=folder)
    assert process.stderr is not None
    while "training a bpe vocabulary" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert (out, err.strip()) in (("", ""), ("", "interrupted"))
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}
    wait_for(lambda: not any(os.fsencode(folder) in line for line in command_lines().values()))
    shutil.rmtree(folder)


def test_the_command_joins_a_cluster(tmp_path: Path) -> None:
    words = ["--tokenizer", "bytes", "--workers", "2"]
    process = start(tmp_path / "out", *words, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith(f"{tmp_path / 'out'}\n  training ")
    assert err == ""
    assert command(["python-docs", "--out", str(tmp_path / "local"), "--tokenizer", "bytes"]) == 0
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "local" / path.name).read_bytes()
