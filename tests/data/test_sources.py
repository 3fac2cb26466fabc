"""Names of files, folders, globs and corpora to documents in a fixed order; what is none of these is named."""

import gzip
from pathlib import Path

import pytest

from gpt_jax.data import sources
from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with some files."""
    monkeypatch.chdir(tmp_path)
    files = {
        "b.txt": b"b",
        "a/z.md": b"z",
        "a/y.jsonl.gz": gzip.compress(b'{"text": "y1"}\n{"text": "y2"}'),
        "a/c/x": b"x",
        "a/.hidden": b"hidden",
        "a/.git/config": b"hidden",
        "a/image.png": b"\x89PNG\0",
        "a/empty.txt": b"",
        "only/image.png": b"\x89PNG\0",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def texts(*names: str) -> list[bytes]:
    return [block.text for block in open_corpus(names).blocks(lambda _: None)]


def test_sources_are_read_in_the_order_they_are_named() -> None:
    assert texts("b.txt", "a/z.md") == [b"b", b"z"]
    assert texts("a/z.md", "b.txt") == [b"z", b"b"]


def test_a_folder_is_read_in_sorted_order_without_hidden_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert texts("a") == [b"x", b"y1", b"y2", b"z"]
    assert capsys.readouterr().err == "a: passed over 2 empty or binary files, such as a/empty.txt\n"


def test_a_data_folder_within_is_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a folder is prepared into a folder of its own, the older output is no text."""
    for name in ("a/data/meta.json", "a/data/train-00000-of-00001.bin", "a/c/meta.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert texts("a") == [b"{}", b"x", b"y1", b"y2", b"z"]  # The meta.json beside no shard is a text like any other.
    assert capsys.readouterr().err.splitlines()[1:] == ["a: passed over 1 data folder, such as a/data"]


def test_globs_match_files_in_sorted_order(folder: Path) -> None:
    assert texts("**/*.md", "*.txt") == [b"z", b"b"]
    assert texts(f"{folder}/a/[x-z]*") == [b"y1", b"y2", b"z"]


def test_a_file_that_is_named_twice_is_read_once(folder: Path) -> None:
    (folder / "link.txt").symlink_to("b.txt")
    assert texts("b.txt", "*.txt", str(folder / "b.txt")) == [b"b"]


def test_progress_adds_up_to_the_bytes_on_the_disk() -> None:
    corpus = open_corpus(["a", "b.txt", "python-docs"])
    steps: list[int] = []
    assert len(list(corpus.blocks(steps.append))) > 300
    assert sum(steps) == corpus.n_bytes
    assert min(steps) >= 0


def test_built_in_corpora_have_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "shakespeare", lambda: folder / "b.txt")
    assert texts("shakespeare") == [b"b"]
    assert len(texts("python-docs")) > 300


def test_a_path_of_that_name_comes_first(folder: Path) -> None:
    (folder / "python-docs").write_bytes(b"mine")
    assert texts("python-docs") == [b"mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c.txt", r"there is no file or folder 'c.txt'; did you mean b.txt\?"),
        ("a/zz.md", r"there is no file or folder 'a/zz.md'; did you mean a/z.md\?"),
        ("shakespear", r"did you mean shakespeare\?"),
        ("no/such/thing", "there is no file or folder 'no/such/thing'; the built-in corpora are python-docs and"),
        ("*.csv", r"no file matches '\*.csv' in /"),
        ("only", "there is no text in the folder only"),
        ("/dev/null", "/dev/null is not a regular file"),
        ("x" * 300, r"cannot be read \(File name too long\)"),
    ],
)
def test_what_is_no_source_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_corpus([name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("a/empty.txt", "is empty"), ("a/image.png", "is a binary file")])
def test_empty_and_binary_files_that_are_named_are_errors(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{name} {message}"):
        texts(name)
