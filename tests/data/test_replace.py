"""A folder appears whole or not at all, and never in the place of something else."""

from pathlib import Path

import pytest

from gpt_jax.data.replace import check_replaceable, whole_folder
from gpt_jax.errors import UserError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


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
    assert list(out.parent.iterdir()) == [out]


def test_it_takes_the_place_of_an_older_one(out: Path) -> None:
    write(out, "old")
    with whole_folder(out) as folder:
        (folder / "file").write_text("new")
        assert (out / "file").read_text() == "old"
    assert (out / "file").read_text() == "new"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_changes_when_it_fails(out: Path, error: type[BaseException]) -> None:
    write(out, "old")
    with pytest.raises(error):
        write(out, "new", error)
    assert (out / "file").read_text() == "old"
    assert list(out.parent.iterdir()) == [out]


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
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_process_left_is_cleared(out: Path) -> None:
    write(out, "old")
    out.rename(out.with_name(".out.old"))  # It was killed between moving the old one away and the new one in.
    partial = out.with_name(".out.partial")
    partial.mkdir()
    (partial / "junk").write_text("junk")
    with pytest.raises(KeyboardInterrupt):
        write(out, "new", KeyboardInterrupt)
    assert (out / "file").read_text() == "old"
    assert list(out.parent.iterdir()) == [out]


def test_two_at_once_are_refused(out: Path) -> None:
    with whole_folder(out) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="another process is writing"), whole_folder(out):
            pass
    assert (out / "file").read_text() == "first"


def test_only_what_is_ours_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", "marker", force=False)
    check_replaceable(tmp_path, "marker", force=False)  # Empty.
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(UserError, match="exists and is not a data folder; choose another --out"):
            check_replaceable(path, "marker", force=True)
    (tmp_path / "marker").touch()
    check_replaceable(tmp_path, "marker", force=True)
    with pytest.raises(UserError, match="exists; --force replaces it when the new one is complete"):
        check_replaceable(tmp_path, "marker", force=False)
