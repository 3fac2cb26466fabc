"""What the tests of odd texts and records share: files as they come, and what is read from them."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError
from tests.data.test_formats import documents

ROWS = b'{"text": "a"}\n{"text": "b"}\n'


def read(*names: object, field: str = "text") -> list[str]:
    """The documents of the sources."""
    return documents(list(open_corpus(map(str, names), field).blocks(lambda _: None)))


def check(path: Path, expected: list[str] | str, field: str = "text") -> None:
    """The documents are those that are expected, or the error of one line has the expected part."""
    if isinstance(expected, list):
        assert read(path, field=field) == expected
        return
    with pytest.raises(UserError) as caught:
        read(path, field=field)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def short(value: object) -> str:
    """A name of a case: its short strings."""
    return value if isinstance(value, str) and len(value) < 20 else ""


def gz(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def zst(content: bytes, **parameters: Any) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(content)
