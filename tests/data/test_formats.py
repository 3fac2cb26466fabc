"""Blocks concatenate to what the file holds, whatever its packing; what cannot be read is named with its place."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import formats
from gpt_jax.data.formats import Block, cut_before_space, cut_document, kind_of, read_blocks
from gpt_jax.errors import UserError
from gpt_jax.system import command_line

TEXT = st.text(st.sampled_from("ab \n\r\t你🙂é▁"), min_size=1, max_size=200)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def documents(blocks: list[Block]) -> list[str]:
    found, parts = [], []
    for block in blocks:
        parts.append(block.text)
        if block.ends_document:
            found.append(b"".join(parts).decode())
            parts = []
    assert not parts
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 16)


@given(text=TEXT, limit=st.integers(1, 300))
def test_a_cut_is_between_characters_and_before_a_space_where_there_is_one(text: str, limit: int) -> None:
    data = text.encode()
    cut = cut_before_space(data, limit)
    assert cut <= limit
    left, right = data[:cut].decode(), data[cut:].decode()
    assert left + right == text
    if right and any(c in " \n" for c in data[1:limit].decode(errors="ignore")):
        assert right[0] in " \n"


@given(text=TEXT)
def test_a_document_is_cut_into_blocks_without_loss(text: str) -> None:
    blocks = list(cut_document(text.encode(), position=7))
    assert documents(blocks) == [text]
    assert all(0 < len(block.text) <= 16 and block.position == 7 for block in blocks)


@pytest.mark.parametrize("suffix", PACK)
@given(text=TEXT)
def test_a_text_file_is_one_document(tmp_path_factory: pytest.TempPathFactory, suffix: str, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](text.encode()))
    blocks = list(read_blocks(path, "text"))
    assert documents(blocks) == [text]
    assert all(0 < len(block.text) <= 16 for block in blocks)
    assert blocks[-1].position == path.stat().st_size


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_are_a_document_each(tmp_path: Path, suffix: str) -> None:
    texts = ["one\nline", "", "二 行 " * 20, "🙂"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix]("\n\n".join([*lines, '{"body": null}']).encode()))
    assert documents(list(read_blocks(path, "body"))) == [text for text in texts if text]


def test_frames_and_members_in_one_file_are_read_on(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACK[suffix](b"one ") + PACK[suffix](b"two"))
        assert documents(list(read_blocks(path, "text"))) == ["one two"]


def test_parquet_rows_are_a_document_each(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [None, *(f"document {i} 你好 " * (i % 7) for i in range(300))]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(301), "body": texts}), path, row_group_size=100)
    assert documents(list(read_blocks(path, "body"))) == [text for text in texts if text]
    with pytest.raises(UserError, match=f"has no column 'text'; {CHOOSE}id, body"):
        list(read_blocks(path, "text"))
    with pytest.raises(UserError, match="row 1: 'id' is not text but of type int"):
        list(read_blocks(path, "id"))


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}')
    for path in tmp_path.iterdir():
        assert documents(list(read_blocks(path, "text"))) == ["abc"]


CHOOSE = re.escape(
    f"choose one of its fields with: {command_line('prepare', 'SOURCE', '--out', 'DIR', '--text-field', 'FIELD')}; "
    "they are: "
)
LATIN = "Grüße ".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\xef\xbb\xbf", "a.txt is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz is empty"),
        ("a.txt", b"abc\0def", "a.txt is a binary file, not text$"),
        (
            "a.txt",
            "abc".encode("utf-16"),
            "binary file, not text; it looks like UTF-16: iconv -f utf-16 -t utf-8 a.txt",
        ),
        ("a.txt", b"x" * 20 + LATIN, r"a.txt is not UTF-8 text: byte 22 is 0xfc; convert it"),
        ("a.txt", b"\xef\xbb\xbf" + LATIN, "byte 5 is 0xfc"),
        ("a.txt", b"\x80" * 100, "byte 0 is 0x80"),
        ("a.txt", "你".encode()[:2], "byte 0 is 0xe4"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-3], "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"some text", "a.txt.gz is damaged or cut short"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"some text" * 99)[:-3], "damaged or cut short"),
        ("a.txt.zst", b"some text", "a.txt.zst is damaged or cut short"),
        ("a.jsonl", b'{"text": "a"}\nno json\n', r"a.jsonl, line 2 is not JSON \("),
        ("a.jsonl", b'["text"]', "line 1 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'{"id": 1, "body": ""}', f"no field 'text'; {CHOOSE}id, body"),
        ("a.jsonl", b'{"text": 5}', "line 1: 'text' is not text but of type int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: character 0 of 'text' is half of a surrogate pair"),
        ("a.jsonl", b'{"text": "' + LATIN + b'"}', "line 1 is not UTF-8 text: byte 12 of the line is 0xfc"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.parquet", b"PAR1 not really", "a.parquet cannot be read as Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_blocks(path, "text"))
    assert "\n" not in str(caught.value)


def test_a_line_too_long_to_parse_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "short"}\n{"text": "' + b"x" * (1 << 20))
    with pytest.raises(UserError, match="line 2 is longer than 1 MiB"):
        list(read_blocks(path, "text"))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.txt cannot be read \(No such file or directory\)"):
        list(read_blocks(tmp_path / "gone.txt", "text"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a", b"text", "text"),
        ("a", b"", "empty"),
        ("a", b"a\0", "binary"),
        ("a.gz", gzip.compress(b"\0", mtime=0), "binary"),
    ],
)
def test_text_is_told_from_other_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name, "text") == expected
