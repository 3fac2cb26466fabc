"""`prepare --engine ray`: the files of the default engine, whoever dies, and what is said when there is no cluster."""

import contextlib
import dataclasses
import json
import os
import random
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
from gpt_jax.data import sources as sources_module
from gpt_jax.data.pieces import Job, Piece
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.sources import open_corpus
from gpt_jax.data.worker import JOBS
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests.cases import cases
from tests.commands import wait_for
from tests.storage.s3 import s3_server

ray = pytest.importorskip("ray")
s3fs = pytest.importorskip("s3fs")
ray_engine = pytest.importorskip("gpt_jax.data.ray_engine")

WORDS = ["the", "model", "写", "learns\n", "▁", "🙂", "  indented", "2024", "<|endoftext|>"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """One of four cores, whatever this machine has, whose workers know a bucket. Ray sets variables of this process,
    which other tests are not to have: a cluster by another one would ask for a token."""
    environment = dict(os.environ)
    with s3_server() as bucket:
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # The workers cannot import it.
        yield bucket
        ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts-*.jsonl, some of them twice, and chat-*.jsonl, of which some lines are broken."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 200)))

    for i in range(8):
        texts = [text() for _ in range(20)]
        chats = [[{"role": role, "content": text()} for role in ("user", "assistant")] for _ in range(20)]
        lines = [json.dumps({"messages": messages}) for messages in chats]
        (folder / f"texts-{i}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts + texts[:5]))
        (folder / f"chat-{i}.jsonl").write_text("\n".join([*lines, "{", lines[0]]))
    return folder


CLEAN = CleanConfig(normalize="nfkc", dedup="exact")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "texts": ("texts-*.jsonl", {"vocab_size": 320}),
    "cleaned texts": ("texts-*.jsonl", {"tokenizer": "bytes", "clean": CLEAN}),
    "conversations": ("chat-*.jsonl", {"vocab_size": 320, "clean": CLEAN, "skip_broken": True}),
}


def prepared(sources: str | Path, case: str, out: Path, **settings: Any) -> dict[str, bytes]:
    """The files of the folder, by their names, without the settings, in which the source is."""
    file, options = CASES[case]
    prepare(PrepareArgs(source=(f"{sources}/{file}",), out=out, **options, **settings))
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    meta = json.loads(files.pop("meta.json"))
    meta["settings"].pop("source")
    return files | {"meta": json.dumps(meta).encode()}


def command_lines() -> dict[int, bytes]:
    """Those of all processes on this machine."""
    found = {}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It has just ended.
            found[int(process.parent.name)] = process.read_bytes()
    return found


def dies_once(marker: Path) -> None:
    """Kills this process, the first time that a process comes here."""
    with contextlib.suppress(FileExistsError):
        marker.touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


def dying(marker: Path, times: int = 1) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both stages, with processes that die in the middle of a task, until each stage has lost as many."""
    read, work = ray_engine._read, ray_engine._work

    def reads(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, rows in enumerate(read(*args, **kwargs)):
            if i == 1:
                for n in range(times):
                    dies_once(marker.with_name(f"{marker.name}-read-{n}"))
            yield rows

    def works(*args: Any, **kwargs: Any) -> Any:
        for n in range(times):
            dies_once(marker.with_name(f"{marker.name}-work-{n}"))
        return work(*args, **kwargs)

    return reads, works


@pytest.mark.parametrize("case", cases(CASES, ["cleaned texts"]))
def test_the_files_are_those_of_the_default_engine(
    sources: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For any number of workers, of which one is killed as it reads, and one as it tokenizes."""
    expected = prepared(sources, case, tmp_path / "local")
    monkeypatch.setattr(sources_module, "PART_BYTES", 40_000)
    said = capfd.readouterr().err.splitlines()
    for workers in (1, 2, 4):
        reads, works = dying(tmp_path / f"killed-{workers}")
        monkeypatch.setattr(ray_engine, "_read", reads)
        monkeypatch.setattr(ray_engine, "_work", works)
        assert prepared(sources, case, tmp_path / f"ray-{workers}", engine="ray", workers=workers) == expected
        monkeypatch.undo()
        assert len([*tmp_path.glob(f"killed-{workers}-*")]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert {*said} <= {*err.splitlines()}
        assert "Warning" not in err


def test_what_is_read_late_comes_in_its_place(sources: Path) -> None:
    def read(item: str) -> Iterator[Piece]:
        yield Piece(0, f"{item} begins")
        time.sleep(0.5 * (3 - int(item)))
        yield Piece(0, f"{item} ends")

    corpus, items = open_corpus([str(sources)]), ["0", "1", "2", "3"]
    with ray_engine.ray_engine(4) as engine, engine.run("reading", corpus, read, items) as found:
        assert [label for label, _ in found] == [f"{item} {what}" for item in items for what in ("begins", "ends")]


def test_a_task_that_every_worker_dies_of_is_an_error(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, works = dying(tmp_path / "killed", times=100)
    monkeypatch.setattr(ray_engine, "_work", works)
    with pytest.raises(UserError, match=r"^the Ray cluster failed \(.+\); a task is tried 3 times$"):
        prepared(sources, "texts", tmp_path / "out", engine="ray", workers=1)
    assert len([*tmp_path.glob("killed-work-*")]) == ray_engine.ATTEMPTS
    assert not (tmp_path / "out").exists()


def test_remote_sources_are_read_by_the_workers(sources: Path, tmp_path: Path, cluster: str) -> None:
    expected = prepared(sources, "texts", tmp_path / "local")
    s3fs.S3FileSystem().put(f"{sources}/*", f"{cluster}/sources/")
    assert prepared(f"{cluster}/sources", "texts", tmp_path / "ray", engine="ray", workers=2) == expected


def test_what_is_wrong_with_a_source_is_said_as_by_the_default_engine(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": "a b c " * 99})] * 10
    path.write_text("\n".join([*lines, "{", *lines]))
    args = PrepareArgs(source=(str(path),), out=tmp_path / "out", tokenizer="bytes")
    errors = list[str]()
    for engine in ("local", "ray"):
        with pytest.raises(UserError) as raised:
            prepare(dataclasses.replace(args, engine=engine))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert f"{path}, line 11 is not JSON" in errors[0]


def test_workers_need_no_folder_of_this_machine(tmp_path: Path) -> None:
    """They are sent the tokenizer with all its files."""
    tokenizer = ByteTokenizer().with_chat_template("{{ messages[0].content }}")
    job = Job("chat", tokenizer.save(tmp_path))
    lines = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": None}).encode()
    expected = JOBS["chat"](str(job.argument))(lines)
    portable = ray_engine._portable(job)
    for path in tmp_path.iterdir():
        path.unlink()
    rows = ray_engine._work({"piece": [ray_engine._packed(Piece(3, "a", lines, is_task=True))]}, b"key", *portable)
    assert [ray_engine._unpacked(packed) for packed in rows["piece"]] == [Piece(3, "a", expected, is_task=True)]


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"^--engine ray needs Ray Data: pip install 'gpt-jax\[ray\]'$"):
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


@pytest.mark.parametrize(
    ("signum", "status"), cases([(signal.SIGINT, 130), (signal.SIGTERM, 143)], [(signal.SIGTERM, 143)])
)
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
