"""Files and folders appear whole or not at all, never in the place of something else, and by one process at a time."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.storage.files import check_replaceable, locked, replacing, save_json, whole_folder


def test_a_file_takes_its_place_at_the_end_and_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    synced: list[tuple[str, str]] = []

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "file", path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert synced == [("file", "old"), ("folder", "new")]  # The content before the rename, the name after it.
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_utf_8_that_people_can_read(tmp_path: Path) -> None:
    save_json(tmp_path / "a.json", {"text": "语言", "list": [1, 2.5, None]})
    content = (tmp_path / "a.json").read_bytes()
    assert json.loads(content) == {"text": "语言", "list": [1, 2.5, None]}
    assert "语言".encode() in content
    assert content.endswith(b"}\n")


LOCK = ".out.lock"  # It stays.


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def names_beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


def write(out: Path, text: str, error: type[BaseException] | None = None) -> None:
    with whole_folder(out) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text(text)
        if error:
            raise error


def test_it_appears_at_the_end(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "file").write_text("new")
        assert not out.exists()
    assert (out / "file").read_text() == "new"
    assert names_beside(out) == {out.name, LOCK}


def test_it_takes_the_place_of_an_older_one(out: Path) -> None:
    write(out, "old")
    with whole_folder(out) as folder:
        (folder / "file").write_text("new")
        assert (out / "file").read_text() == "old"
    assert (out / "file").read_text() == "new"
    assert names_beside(out) == {out.name, LOCK}


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_changes_when_it_fails(out: Path, error: type[BaseException]) -> None:
    write(out, "old")
    with pytest.raises(error):
        write(out, "new", error)
    assert (out / "file").read_text() == "old"
    assert names_beside(out) == {out.name, LOCK}


def test_the_older_one_is_put_back_when_the_last_step_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write(out, "new")
    assert (out / "file").read_text() == "old"
    assert names_beside(out) == {out.name, LOCK}


def test_what_a_killed_process_left_is_cleared(out: Path) -> None:
    write(out, "old")
    out.rename(out.with_name(".out.old"))  # It was killed between moving the old one away and the new one in.
    partial = out.with_name(".out.partial")
    partial.mkdir()
    (partial / "junk").write_text("junk")
    with pytest.raises(KeyboardInterrupt):
        write(out, "new", KeyboardInterrupt)
    assert (out / "file").read_text() == "old"
    assert names_beside(out) == {out.name, LOCK}


def test_two_at_once_are_refused(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="another process is writing"), whole_folder(out):
            pass
    assert (out / "file").read_text() == "first"


def test_a_lock_holds_for_one_process_until_that_ends(tmp_path: Path) -> None:
    file = tmp_path / "run" / ".lock"
    code = "import pathlib, sys; from gpt_jax.storage.files import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1]), ''): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match=r"^somebody is there$"), locked(file, "somebody is there"):
            pass
        process.kill()
    for _ in range(2):  # The file that stays means nothing.
        with locked(file, "somebody is there"):
            pass


def test_a_lock_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's existence is the lock then, so it must not be there before."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = tmp_path / ".lock"
    for _ in range(2):
        with locked(file, "somebody is there"):
            with pytest.raises(UserError, match=r"^somebody is there$"), locked(file, "somebody is there"):
                pass
            assert file.exists()
        assert not file.exists()


def test_only_what_is_ours_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", "marker", force=False)
    check_replaceable(tmp_path, "marker", force=False)  # Empty.
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(UserError, match="exists and was not written by this command; choose another --out"):
            check_replaceable(path, "marker", force=True)
    inside = tmp_path / "letter.txt" / "new"
    with pytest.raises(UserError) as caught:
        check_replaceable(inside, "marker", force=True)
    assert str(caught.value) == f"{inside} could not be written (Not a directory)"
    (tmp_path / "marker").touch()
    check_replaceable(tmp_path, "marker", force=True)
    with pytest.raises(UserError, match="exists; --force replaces it when the new one is complete"):
        check_replaceable(tmp_path, "marker", force=False)
