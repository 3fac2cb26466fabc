"""What is remote is read and written as what is local: the same documents, tokens and messages."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gpt_jax.data.preferences import PreferenceFiles
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.problems import ProblemFiles
from gpt_jax.data.shards import Dataset, load_meta, missing, open_dataset
from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import RemotePath, location
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.commands import TINY, refused_here, run_here
from tests.storage.failing import make_fail
from tests.storage.s3 import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """The address of an empty folder of each of two backends."""
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs.clear()
        return "memory://bucket"
    return f"{request.getfixturevalue('s3')}/{request.node.originalname}"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of files of every kind."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i} of a table"} for i in range(200)]
    lines = "".join(json.dumps({"text": f"line {i} of a file"}) + "\n" for i in range(300))
    files = {
        "a/x.txt": b"text in a folder. " * 100,
        "a-b/x.txt": b"text beside it. " * 100,
        "lines.jsonl": lines.encode(),
        "packed.jsonl.gz": gzip.compress(lines.encode()),
        "values.json": json.dumps(rows).encode(),
        "a/.hidden": b"hidden",
        ".git/config": b"hidden",
        "a/image.png": b"\x89PNG\0",
        "empty.txt": b"",
        "data/meta.json": b"{}",
        "data/train-00000-of-00001.bin": b"abcd",
        "data/sub/x.txt": b"below a data folder",
    }
    for name, content in files.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / "table.parquet", row_group_size=50)
    return tmp_path / "corpus"


def uploaded(local: Path, to: str) -> str:
    """The address of a copy of a local folder."""
    for file in (file for file in local.rglob("*") if file.is_file()):
        RemotePath(f"{to}/{file.relative_to(local)}").upload(file)
    return to


def test_a_remote_corpus_equals_the_local_one(root: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = open_corpus([str(corpus)])
    notes = capsys.readouterr().err
    there = open_corpus([uploaded(corpus, root)])
    assert capsys.readouterr().err == notes.replace(str(corpus), root)
    assert there.n_bytes == local.n_bytes
    for _ in range(2):
        positions: list[int] = []
        assert list(there.blocks(positions.append)) == list(local.blocks(lambda n: None))
        assert sum(positions) == there.n_bytes


@pytest.mark.parametrize("pattern", ["*.jsonl*", "**/x.txt", "a/*.t[x]t", "lines.jsonl"])
def test_remote_names_and_globs(root: str, corpus: Path, pattern: str) -> None:
    uploaded(corpus, root)
    there, here = open_corpus([f"{root}/{pattern}"] * 2), open_corpus([f"{corpus}/{pattern}"])
    assert list(there.blocks(lambda n: None)) == list(here.blocks(lambda n: None))


def test_remote_sources_that_are_not_there(root: str, corpus: Path) -> None:
    uploaded(corpus, root)
    for name, message in {
        "line.jsonl": f"there is no file or folder {root}/line.jsonl; did you mean {root}/lines.jsonl?",
        "zzzz": f"there is no file or folder {root}/zzzz",
        "*.zip": f"no file matches {root}/*.zip",
        "empty.txt": f"{root}/empty.txt is empty",
        "a/image.png": f"{root}/a/image.png is a binary file, not text",
    }.items():
        with pytest.raises(UserError) as e:
            list(open_corpus([f"{root}/{name}"]).blocks(lambda n: None))
        assert str(e.value).startswith(message)


def test_damage_in_a_remote_file_is_named(root: str, corpus: Path) -> None:
    with (corpus / "lines.jsonl").open("a") as file:
        file.write("{")
    uploaded(corpus, root)
    with pytest.raises(UserError, match=f"{root}/lines.jsonl, line 301"):
        list(open_corpus([root]).blocks(lambda n: None))


def tokens(data: Dataset) -> list[np.ndarray]:
    return [part for files in (data.train, data.val) for part in (files.read(0, len(files)), files.document_starts)]


@pytest.fixture
def prepared(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data folder of several shards."""
    monkeypatch.setattr("gpt_jax.data.shards.SHARD_TOKENS", 5000)
    prepare(PrepareArgs(source=(str(corpus),), out=tmp_path / "data", tokenizer="bytes", workers=1))
    return tmp_path / "data"


def test_a_remote_data_folder_equals_the_local_one(root: str, corpus: Path, prepared: Path, tmp_path: Path) -> None:
    uploaded(corpus, f"{root}/corpus")
    out = location(f"{root}/data")
    args = PrepareArgs(source=(f"{root}/corpus",), out=out, tokenizer="bytes", workers=1)
    prepare(args)
    assert isinstance(out, RemotePath)
    names = [path.name for path in out.files()]
    assert names == sorted(path.name for path in prepared.iterdir())
    assert [(out / n).read_bytes() for n in names if n != "meta.json"] == [
        (prepared / n).read_bytes() for n in names if n != "meta.json"
    ]
    here, there = open_dataset(prepared), open_dataset(out)
    assert all(map(np.array_equal, tokens(here), tokens(there)))
    assert there.tokenizer.fingerprint == here.tokenizer.fingerprint
    with pytest.raises(UserError, match="exists; --force replaces it"):
        prepare(args)
    shutil.rmtree(corpus / "a")
    prepare(PrepareArgs(source=(str(corpus),), out=out, tokenizer="bytes", force=True, workers=1))
    assert load_meta(out).train.tokens < here.meta.train.tokens


def test_remote_sets_equal_the_local_ones(root: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "chosen": f"yes {i}", "rejected": "no" * (i + 1)} for i in range(40)]
    problems = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows]
    found = []
    for place in (tmp_path, location(root)):
        sets: list[object] = []
        for name, records in (("preferences", rows), ("problems", problems)):
            (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
            out = place / f"{name}-data"
            prepare(PrepareArgs(source=(str(tmp_path / name),), out=out, tokenizer="bytes", workers=1))
            data = open_dataset(out)
            if name == "preferences":
                pairs = PreferenceFiles(data, "train")
                sets += [pairs.pair(i) for i in range(len(pairs))]
            else:
                problem_files = ProblemFiles(data, "train")
                sets += [problem_files.problem(i) for i in range(len(problem_files))]
        found.append(sets)
    assert len(found[0]) > 60
    np.testing.assert_equal(found[0], found[1])


def test_requests_that_fail_change_nothing(corpus: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").store.clear()
    uploaded(corpus, "memory://bucket/corpus")
    failing, waits = make_fail(monkeypatch, lambda n: TimeoutError("no answer") if n % 5 == 0 else None)
    out = RemotePath("memory://bucket/data")
    prepare(PrepareArgs(source=("memory://bucket/corpus",), out=out, tokenizer="bytes", workers=1))
    assert all(map(np.array_equal, tokens(open_dataset(prepared)), tokens(open_dataset(out))))
    assert len(waits) == failing.calls // 5 > 20


def test_a_damaged_remote_data_folder(root: str, prepared: Path) -> None:
    folder = location(uploaded(prepared, f"{root}/data"))
    assert isinstance(folder, RemotePath)
    shard = folder / load_meta(folder).train.shards[-1].name
    (prepared / "cut").write_bytes(shard.read_bytes()[:-2])
    shard.upload(prepared / "cut")
    with pytest.raises(UserError, match=rf"{shard} has \d+ bytes instead of \d+; prepare the data again"):
        open_dataset(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} cannot be read .*; prepare the data again"):
        open_dataset(folder)
    (prepared / "tokenizer.json").write_text("{")
    (folder / "tokenizer.json").upload(prepared / "tokenizer.json")
    with pytest.raises(UserError, match=f"^{folder}/tokenizer.json "):
        open_dataset(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=f"{folder} is not a data folder: it has no meta.json"):
        open_dataset(folder)
    with pytest.raises(UserError, match=f"there is no data folder {root}/dat; .*; did you mean {folder}"):
        open_dataset(location(f"{root}/dat"))
    assert "did you mean" not in str(missing(location(f"{root}/zzzz"), ""))


def test_a_folder_that_is_replaced_while_it_is_opened(root: str, tmp_path: Path) -> None:
    """By another of the same size."""

    def prepare_text(text: str) -> None:
        (tmp_path / "text").write_text(text)
        prepare(PrepareArgs(source=(str(tmp_path / "text"),), out=folder, tokenizer="bytes", force=True, workers=1))

    def replace_and_load(path: Path) -> Tokenizer:
        prepare_text("two text" * 500)
        return load_tokenizer(path)

    folder = location(f"{root}/data")
    prepare_text("one text" * 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_jax.data.shards.load_tokenizer", replace_and_load)
        with pytest.raises(UserError, match=f"{folder} was replaced while it was opened; start again"):
            open_dataset(folder)


def test_the_commands(s3: str, corpus: Path, tmp_path: Path) -> None:
    """A run learns the same from data in a bucket as from local ones, and finds them again."""
    there, here = f"{s3}/commands", tmp_path / "here"
    for out in (there, here):
        run_here("prepare", corpus / "lines.jsonl", "--out", out, "--tokenizer=bytes")
    assert refused_here("prepare", corpus / "lines.jsonl", "--out", there) == (
        f"error: {there} exists; --force replaces it when the new one is complete"
    )
    losses = []
    for number, data in enumerate((there, here)):
        run = tmp_path / f"run{number}"
        run_here("train", *TINY, "--data.dir", data, "--out-dir", run, "--train.steps=3")
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
        assert run_here("eval", "--run", run, "--json")
    assert losses[0] == losses[1]
    assert f"did you mean {there}?" in refused_here("train", *TINY, f"--data.dir={there}x", "--out-dir", tmp_path / "x")
