"""The built-in corpora: clean English without a network, and a download that is checked."""

import hashlib
import re
import sys
from pathlib import Path

import pytest

from gpt_jax.data import corpora
from gpt_jax.data.corpora import python_docs, shakespeare
from gpt_jax.errors import UserError


def test_python_docs_are_two_megabytes_of_clean_text() -> None:
    documents = python_docs()
    text = "".join(documents)
    assert 1.5e6 < len(text.encode()) < 2.5e6
    assert len(set(documents)) == len(documents) > 300
    assert sum(c.isascii() for c in text) > 0.999 * len(text)
    assert not re.search(r"\t| \n|\n{4}|\r", text)
    assert all(document.endswith("\n") and document[0] not in " \n" for document in documents)


def test_python_docs_have_topics_and_modules() -> None:
    documents = python_docs()
    assert any(document.startswith('The "assert" statement\n****') for document in documents)
    [textwrap] = [document for document in documents if document.startswith("textwrap\n")]
    assert "\ntextwrap.dedent(text)\n\nRemove any common leading whitespace from every line in `text`.\n" in textwrap
    assert "_munge_whitespace" not in textwrap  # Private.


def test_python_docs_import_no_module() -> None:
    assert "turtle" not in sys.modules
    assert any(document.startswith("turtle\n") for document in python_docs())


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the one on the network; the cache is empty."""
    file = tmp_path / "served.txt"
    file.write_bytes(b"First Citizen:\n")
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", file.as_uri())
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return file


def test_shakespeare_is_downloaded_once(served: Path, tmp_path: Path) -> None:
    path = shakespeare()
    assert path.read_bytes() == served.read_bytes()
    served.unlink()
    assert shakespeare() == path
    assert list((tmp_path / "cache" / "gpt_jax").iterdir()) == [path]


def test_a_damaged_copy_is_downloaded_again(served: Path) -> None:
    path = shakespeare()
    path.write_bytes(b"First")
    assert shakespeare().read_bytes() == served.read_bytes()


def test_another_file_than_expected_is_refused(served: Path, tmp_path: Path) -> None:
    served.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UserError, match=r"has the checksum \w+, not \w+; .* name your copy instead"):
        shakespeare()
    assert not (tmp_path / "cache").exists()


def test_without_a_network_it_says_what_to_do(served: Path) -> None:
    served.unlink()
    with pytest.raises(UserError, match=r"could not be downloaded .* name your copy instead of the corpus$"):
        shakespeare()


def test_a_cache_that_cannot_be_written_is_named(served: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(UserError, match=r"tinyshakespeare.txt could not be written"):
        shakespeare()
