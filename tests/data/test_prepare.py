"""From text to a data folder: nothing lost, the same for any number of workers, whole or not at all."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_jax.cli.prepare import command
from gpt_jax.data import formats
from gpt_jax.data import prepare as prepare_module
from gpt_jax.data import texts as texts_module
from gpt_jax.data.prepare import PrepareArgs
from gpt_jax.data.shards import Dataset, Meta, open_dataset
from gpt_jax.data.train_tokenizer import train_sentencepiece
from gpt_jax.errors import UserError
from gpt_jax.storage.files import locked
from tests.cases import cases
from tests.commands import wait_for


def prepare(source: Path, out: Path, **settings: Any) -> Meta:
    """`prepare` of one source."""
    return prepare_module.prepare(PrepareArgs(source=(str(source),), out=out, **settings))


def texts(data: Dataset) -> dict[str, list[str]]:
    """The documents of both splits, decoded."""
    found = {}
    for name, files in (("train", data.train), ("val", data.val)):
        bounds = [*files.document_starts.tolist(), len(files)]
        ids = [files.read(a, b - a).tolist() for a, b in itertools.pairwise(bounds)]
        assert all(document[-1] == data.tokenizer.end_of_text for document in ids)
        found[name] = [data.tokenizer.decode(document[:-1]) for document in ids]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[str]]:
    """JSON Lines of 300 documents, and their texts."""
    rng = random.Random(0)
    words = ["the", "model", "写", "learns\n", "▁", "🙂", "  indented", "2024", "<|endoftext|>"]
    documents = [" ".join(rng.choices(words, k=rng.randrange(1, 200))) for _ in range(300)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return path, documents


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "bytes"])
def test_every_document_comes_back_once(corpus: tuple[Path, list[str]], tmp_path: Path, tokenizer: str) -> None:
    path, documents = corpus
    meta = prepare(path, tmp_path / "out", tokenizer=tokenizer, vocab_size=320)
    data = open_dataset(tmp_path / "out")
    found = texts(data)
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert [text for text in documents if text in set(found["val"])] == found["val"]  # In the order of the corpus.
    for name, split in (("train", meta.train), ("val", meta.val)):
        assert split.bytes == sum(len(text.encode()) for text in found[name])
        assert split.documents == len(found[name])
    assert 0.05 < data.val.n_bytes / (data.val.n_bytes + data.train.n_bytes) < 0.15
    assert meta.settings["split"] == "by document"


def test_the_files_do_not_depend_on_the_workers(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "TASK_BYTES", 2000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 500)
    for workers in (1, 2, 5):
        prepare(corpus[0], tmp_path / str(workers), vocab_size=320, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "5")
    found = texts(open_dataset(tmp_path / "1"))
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1])


def test_a_tokenizer_can_be_used_again(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    first = prepare(corpus[0], tmp_path / "first", vocab_size=320)
    (tmp_path / "other.txt").write_text("other text " * 20)
    for name in ("first", "first/tokenizer.model"):
        out = tmp_path / name.replace("/", "-again-")
        other = prepare(tmp_path / "other.txt", out, tokenizer=str(tmp_path / name), force=True)
        assert other.tokenizer_fingerprint == first.tokenizer_fingerprint


@pytest.mark.parametrize("text", ["One document.\n" * 50, "一个文件" * 100], ids=["words", "no spaces"])
def test_one_document_is_split_by_position(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    meta = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0.25)
    found = texts(open_dataset(tmp_path / "out"))
    [train], [val] = found["train"], found["val"]
    assert train + val == text
    assert 0.2 < len(val) / len(text) < 0.3
    assert meta.settings["split"] == "by position"


def test_a_large_vocabulary_takes_wider_ids(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (90_000, 6)).astype(np.uint8)
    (tmp_path / "words.txt").write_bytes(b" ".join(map(bytes, letters)))
    meta = prepare(tmp_path / "words.txt", tmp_path / "out", vocab_size=70_000)
    data = open_dataset(tmp_path / "out")
    assert meta.dtype == "uint32"
    assert data.train.read(0, len(data.train)).max() > 65_535


def test_the_command_prints_what_there_is_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my data"
    assert command(["python-docs", "--out", str(out), "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}\n  training ")
    assert "  vocabulary             261 tokens         1.00 bytes a token\n" in printed
    assert printed.endswith(f" -m gpt_jax train --data.dir '{out}'\n")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "a.jsonl is empty|there is no text"),
        ('{"text": ""}\n', {}, "there is no text: every document is empty"),
        ('{"text": "a"}\n', {}, "1 bytes of text are too few for training and validation"),
        ('{"text": "abc def"}\n', {}, "vocabulary of 4096 is not possible"),
        ('{"text": "abc def"}\n', {"vocab_size": 0}, "vocab_size = 0 is not possible: it must be 1 or more"),
        ('{"text": "abc def"}\n', {"val_fraction": 1.0}, r"val_fraction = 1.0 is not possible: it must be more than 0"),
        ('{"text": "abc def"}\n', {"tokenizer": "gone"}, "there is no tokenizer gone"),
    ],
)
def test_nothing_is_written_when_it_cannot_work(
    tmp_path: Path, text: str, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    arguments = {"tokenizer": "bytes"} | arguments if "4096" not in message else arguments
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", **arguments)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", ".out.lock"}


def test_no_source_and_no_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source = .* it must be one or more files"):
        PrepareArgs(source=(), out=tmp_path / "out")
    with pytest.raises(UserError, match="model_type = 'words' is not possible: it must be bpe or unigram or char"):
        PrepareArgs(source=("python-docs",), out=tmp_path / "out", model_type="words")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("text " * 100)
    with pytest.raises(UserError, match=r"file/out could not be written \(Not a directory\)|File exists"):
        prepare(tmp_path / "file", tmp_path / "file" / "out", tokenizer="bytes")


def test_what_would_fail_at_the_end_fails_before_the_text_is_read(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take hours."""
    monkeypatch.setattr(prepare_module, "survey_texts", lambda *_: pytest.fail("the text was read"))
    text, out = corpus[0], tmp_path / "out"
    with pytest.raises(UserError, match="there is no tokenizer gone"):
        prepare(text, out, tokenizer="gone")
    with pytest.raises(UserError, match=r"out could not be written \(Not a directory\)"):
        prepare(text, text / "out")
    with (
        locked(tmp_path / ".out.lock", ""),
        pytest.raises(UserError, match=r"another process is writing .*out; wait for it"),
    ):
        prepare(text, out)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading Parquet needs pyarrow: pip install 'gpt-jax\[parquet\]'"):
        prepare(tmp_path / "a.parquet", out)


def test_text_that_changes_meanwhile_is_noticed(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_then_make(*_: object) -> object:
        corpus[0].write_text('{"text": "something else"}\n' * 100)
        return prepare_module.ByteTokenizer()

    monkeypatch.setattr(prepare_module, "_make_tokenizer", change_then_make)
    with pytest.raises(UserError, match="the text was changed while it was read"):
        prepare(corpus[0], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", ".out.lock"}


def test_nothing_imports_jax() -> None:
    code = "import sys, gpt_jax.data.prepare, gpt_jax.data.worker; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# From here on, prepare runs as a process that is stopped in the middle.


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 MB of words that hardly ever come again, which take seconds to tokenise, and a tokenizer."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("long")
    text = rng.choice(np.frombuffer(b"etaoinsh  \n", np.uint8), 24 << 20).tobytes()
    (folder / "corpus.txt").write_bytes(text)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece([text[:100_000].decode()], "bpe", 400))
    return folder


def start(corpus: Path, out: Path, *flags: str, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gpt_jax", "prepare", str(corpus / "corpus.txt"), "--out", str(out)]
    command += ["--tokenizer", str(corpus), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def is_tokenizing(out: Path) -> bool:
    shard = out.with_name(f".{out.name}.partial") / "train-00000.bin"
    return shard.exists() and shard.stat().st_size > 0


def workers_of(out: Path) -> list[int]:
    """Processes that tokenise into `out`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # It has just ended.
            continue
        if b"gpt_jax.data.worker" in command and os.fsencode(out.with_name(f".{out.name}.partial")) in command:
            found.append(int(process.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_vocabulary_is_trained_ends_cleanly(
    long_corpus: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    process = start(long_corpus, tmp_path / "out", "--tokenizer", "sentencepiece")
    assert process.stderr is not None
    while "training a bpe vocabulary" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.strip() in ("", "interrupted")
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


@needs_proc
@pytest.mark.parametrize(
    ("signum", "status"),
    cases(
        [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
        standing=[(signal.SIGKILL, -signal.SIGKILL)],
    ),
)
def test_a_signal_in_the_middle_leaves_the_older_output(
    long_corpus: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("older text " * 20)
    prepare(tmp_path / "a.txt", out, tokenizer="bytes")
    before = content(out)
    process = start(long_corpus, out, "--force")
    wait_for(lambda: is_tokenizing(out))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert content(out) == before
    wait_for(lambda: not workers_of(out))
    left = {path.name for path in tmp_path.iterdir()} - {"a.txt", "out"}
    assert left == {".out.lock"} | ({".out.partial"} if signum == signal.SIGKILL else set())

    prepare(tmp_path / "a.txt", out, tokenizer="bytes", force=True)  # It clears what was left.
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out", ".out.lock"}
    assert content(out) == before


@needs_proc
def test_a_worker_that_is_killed_changes_nothing(long_corpus: Path, tmp_path: Path) -> None:
    prepare(long_corpus / "corpus.txt", tmp_path / "expected", tokenizer=str(long_corpus))
    out = tmp_path / "out"
    process = start(long_corpus, out)
    wait_for(lambda: is_tokenizing(out))
    os.kill(workers_of(out)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "a worker process was killed by SIGKILL (is memory short?); another one is started\n" in errors
    assert content(out) == content(tmp_path / "expected")


def test_files_that_cannot_grow_leave_nothing(long_corpus: Path, tmp_path: Path) -> None:
    limit = 1 << 20
    process = start(
        long_corpus,
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.endswith("out could not be written (File too large); it is as it was before\n")
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


def test_a_full_disk_leaves_nothing(long_corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    try:
        process = start(long_corpus, disk / "out")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors.endswith("out could not be written (No space left on device); it is as it was before\n")
        assert {path.name for path in disk.iterdir()} <= {".out.lock"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
