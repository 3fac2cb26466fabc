"""A model is found by its path, or downloaded from a hub by its name; no network, or no such model, is told in a line.

A server on this machine stands in for the hub, so that huggingface_hub itself is used, as it comes.
"""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.interop.hub import TIMEOUT, find_model
from gpt_jax.run.load import open_source, stands_for
from gpt_jax.train.setup import start_from
from tests.interop.models import publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"the weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"a template",
    "merges.txt": b"a b",
    "README.md": b"a card",
    "pytorch_model.bin": b"a program",
    "consolidated.safetensors": b"the weights again",
    "onnx/config.json": b"{}",
}
WANTED = ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.model"]
CANNOT = "UserError: there is no folder gpt2, and it cannot be downloaded from"
ERRORS = {"someone/gated": (403, "GatedRepo"), "someone/gone": (404, "RepoNotFound"), "someone/broken": (500, "")}


def file_of(path: str) -> str:
    """The last part of a path."""
    return path.partition("?")[0].rpartition("/")[2]


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks for: a repository's commit, its files, and each of them."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match = re.fullmatch(
            r"/(?:api/models/)?([\w/]+)/(revision|tree|resolve)/(\w+)/?(.*)", self.path.partition("?")[0]
        )
        assert match
        repository, what, _, file = match.groups()
        if what == "revision" and file_of(self.path) not in ("main", COMMIT):
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif repository in ERRORS:
            status, code = ERRORS[repository]
            self.answer(b"", status, {"X-Error-Code": code})
        elif what == "revision":
            self.answer(json.dumps({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": []}).encode())
        elif what == "tree":
            files = {"pytorch_model.bin": b""} if repository == "someone/pickles" else FILES
            entries = [{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in files.items()]
            self.answer(json.dumps(entries).encode())
        else:
            type(self).asked.append(file)
            self.answer(FILES[file], headers={"ETag": f'"{file}"', "X-Repo-Commit": COMMIT})

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def find(cache: Path, name: str, hub: str, timeout: float = TIMEOUT, **environment: str) -> str:
    """What find_model gives, or the line that it tells the user, in a process of its own, as huggingface_hub reads the
    environment once."""
    program = (
        f"import sys\nfrom gpt_jax.errors import UserError\nfrom gpt_jax.interop import hub\nhub.TIMEOUT = {timeout}\n"
        "try:\n    print(hub.find_model(sys.argv[1]))\nexcept UserError as e:\n    print(f'UserError: {e}')\n"
    )
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    environment = inherited | {"HF_HOME": str(cache), "HF_ENDPOINT": hub} | environment
    command = [sys.executable, "-c", program, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "model.gguf").touch()
    assert find_model("gpt2") == Path("gpt2")
    assert find_model("./model.gguf") == Path("model.gguf")
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/gpt2") == tmp_path / "gpt2"


PATHS = [
    "./gpt2",
    "/gpt2",
    "~/gpt2",
    "../a/b",
    "a/b/c",
    "model.gguf",
    "a/b.gguf",
    "a b",
    "gpt2/",
    "a\\b",
    "C:a",
    "a--b",
]
PATHS += ["a..b", "a.git", "-a", "a-", ".a", "caf\xe9", "a" * 97, "x.safetensors", "a@", "@main", "a\n"]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_there_is_not_looked_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_model(name)
    assert str(error.value) == f"there is no folder or file {name}"


def test_a_mistyped_path_is_told_what_may_be_meant(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama-3.2").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        find_model(str(tmp_path / "models" / "llama-32"))
    near = tmp_path / "models" / "llama-3.2"
    assert str(error.value) == f"there is no folder or file {near.with_name('llama-32')} (did you mean {near}?)"


def test_a_look_up_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what may be meant, since a name on the hub looks like a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama2").mkdir(parents=True)
    told = []
    (tmp_path / "model.safetensors").touch()

    def download(name: str) -> Path:
        told.append(capsys.readouterr().err)
        return tmp_path

    monkeypatch.setattr("gpt_jax.interop.hub._download", download)
    assert find_model("models/llama") == tmp_path
    assert told == [
        "there is no folder or file models/llama (did you mean models/llama2?); looking it up on the Hugging Face hub\n"
    ]


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts from a model on the hub names it so that the same files are found later; with --resume, the
    name as the user gave it stands for that."""
    folder = tmp_path / COMMIT
    publish(folder)
    asked = []

    def download(name: str) -> Path:
        asked.append(name)
        return folder

    monkeypatch.setattr("gpt_jax.interop.hub._download", download)
    source = open_source("someone/llama")
    assert source.pinned == f"someone/llama@{COMMIT}"
    assert open_source(source.pinned).pinned == source.pinned
    assert asked == ["someone/llama", source.pinned]
    assert start_from(Config(init_from="someone/llama"))[0].init_from == source.pinned
    assert stands_for(source.pinned, "someone/llama")
    assert stands_for(source.pinned, source.pinned)
    assert not stands_for(source.pinned, "someone/llama2")
    assert not stands_for(f"/someone/llama@{COMMIT}", "/someone/llama")
    assert stands_for(str(tmp_path / "run/checkpoints/12"), str(tmp_path / "run"))
    assert stands_for(str(tmp_path / "b/../a"), str(tmp_path / "c/../a"))
    assert not stands_for(str(tmp_path / "a"), "~nobody-of-this-name/a")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"^there is no folder gpt2; .* huggingface_hub: pip install 'gpt-jax\[interop\]'$"
    ):
        find_model("gpt2")


class TestHub:
    """With huggingface_hub."""

    @pytest.fixture(autouse=True)
    def needs_the_package(self) -> None:
        pytest.importorskip("huggingface_hub")

    @pytest.mark.parametrize("name", ["gpt2", "openai/gpt2"])
    def test_downloads_what_is_of_use_once(self, tmp_path: Path, hub: str, name: str) -> None:
        folder = Path(find(tmp_path, name, hub))
        assert folder.name == COMMIT
        assert sorted(path.name for path in folder.iterdir()) == WANTED
        assert all((folder / file).read_bytes() == FILES[file] for file in WANTED)
        assert set(Hub.asked) == set(WANTED)
        Hub.asked.clear()
        assert find(tmp_path, name, hub) == str(folder)
        assert not Hub.asked
        assert find(tmp_path, f"{name}@{COMMIT}", "http://127.0.0.1:9") == str(folder)  # Without a network, too.

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "someone/gone",
                "there is no folder someone/gone, and no such model at {hub} (a private one needs HF_TOKEN)",
            ),
            ("someone/here@old", "the model someone/here at {hub} has no revision old"),
            (
                "someone/gated",
                "someone/gated is open only to those who accept its terms at {hub}/someone/gated; then set HF_TOKEN",
            ),
            ("someone/broken", "there is no folder someone/broken, and it cannot be downloaded from {hub} (Server "),
            ("someone/pickles", "someone/pickles on the hub has no model*.safetensors; "),
        ],
        ids=["gone", "no revision", "gated", "broken", "pickles"],
    )
    def test_a_refusal_is_told_in_one_line(self, tmp_path: Path, hub: str, name: str, message: str) -> None:
        told = find(tmp_path, name, hub)
        assert told.startswith("UserError: " + message.format(hub=hub))
        assert "\n" not in told

    def test_no_network_is_told_within_seconds(self, tmp_path: Path) -> None:
        start = time.monotonic()
        told = find(tmp_path, "gpt2", "http://127.0.0.1:9")
        assert told == f"{CANNOT} http://127.0.0.1:9 ([Errno {errno.ECONNREFUSED}] Connection refused)"
        assert time.monotonic() - start < 10

    @pytest.mark.slow
    def test_a_hub_that_never_answers(self, tmp_path: Path) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            port = server.getsockname()[1]
            told = find(tmp_path, "gpt2", f"http://127.0.0.1:{port}", timeout=2.0)
        assert told == f"{CANNOT} http://127.0.0.1:{port} (timed out)"

    def test_offline_mode(self, tmp_path: Path, hub: str) -> None:
        told = find(tmp_path, "gpt2", hub, HF_HUB_OFFLINE="1")
        assert told.startswith(f"{CANNOT} {hub} (")
        assert "offline mode" in told
        assert "\n" not in told
