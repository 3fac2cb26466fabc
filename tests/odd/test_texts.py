"""Odd texts, packed files, names and folders: each is read as it should be, or refused in one line that says why."""

import bz2
import io
import json
import lzma
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import open_dataset
from tests.commands import refused_here, run_here
from tests.odd.corpus import ROWS, check, gz, read, short, zst

LONG = "x" * (3 << 20)
CUT = "你🙂" * 200_000  # A block ends within a character.


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"\xef\xbb\xbfabc", ["abc"], id="byte order mark"),
        pytest.param(b"\xef\xbb\xbf\xef\xbb\xbfabc", ["\ufeffabc"], id="two byte order marks"),
        pytest.param(b"a\r\nb\r\n", ["a\r\nb\r\n"], id="CRLF"),
        pytest.param(b"a\rb\r", ["a\rb\r"], id="lone CR"),
        pytest.param("a\u2028b\u2029c\x85d\x0be\x0c".encode(), ["a\u2028b\u2029c\x85d\x0be\x0c"], id="line separators"),
        pytest.param(b"\x1b[31mred\x7f\x01\x1a", ["\x1b[31mred\x7f\x01\x1a"], id="control characters"),
        pytest.param("\ufffe\U0010ffff\ue000".encode(), ["\ufffe\U0010ffff\ue000"], id="noncharacters"),
        pytest.param("e\u0301 👩\u200d👩\u200d👧".encode(), ["e\u0301 👩\u200d👩\u200d👧"], id="not normalised"),
        pytest.param(b" \n\t \r\n", [" \n\t \r\n"], id="white space only"),
        pytest.param(b"\n", ["\n"], id="one newline"),
        pytest.param(b"<|endoftext|><s>\xe2\x96\x81", ["<|endoftext|><s>▁"], id="names of special tokens"),
        pytest.param(LONG.encode(), [LONG], id="one line of 3 MiB"),
        pytest.param(CUT.encode(), [CUT], id="1.4 MB without a space"),
        pytest.param(b"a" * 9000 + b"\0b", ["a" * 9000 + "\0b"], id="NUL far behind"),
        pytest.param(b"a\0b", "is a binary file, not text", id="NUL"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\xef\xbb\xbf", "is empty", id="only a byte order mark"),
        pytest.param(b"caf\xe9", "is not UTF-8 text: byte 3 is 0xe9; convert it", id="latin-1"),
        pytest.param(b"\xc0\x80", "byte 0 is 0xc0", id="overlong NUL"),
        pytest.param(b"ab\xed\xa0\x80", "byte 2 is 0xed", id="surrogate in UTF-8"),
        pytest.param(b"ab\xf4\x90\x80\x80", "byte 2 is 0xf4", id="beyond Unicode"),
        pytest.param("abc你".encode()[:-1], "byte 3 is 0xe4", id="cut within a character"),
        pytest.param(b"x" * (1 << 20) + b" \xff", f"byte {(1 << 20) + 1} is 0xff", id="wrong after 1 MiB"),
        pytest.param("hello".encode("utf-16-le"), "is a binary file, not text", id="UTF-16 without a mark"),
        pytest.param(b"\xff\xfe" + "hé".encode("utf-16-le"), "UTF-16: iconv -f utf-16 -t utf-8 a.txt", id="UTF-16 LE"),
        pytest.param(b"\xfe\xff" + "hé".encode("utf-16-be"), "UTF-16: iconv -f utf-16 -t utf-8 a.txt", id="UTF-16 BE"),
        pytest.param("hé".encode("utf-32"), "UTF-32: iconv -f utf-32 -t utf-8 a.txt", id="UTF-32"),
        pytest.param(b"%PDF-1.7\nstream", "it is a PDF: pdftotext extracts the text", id="PDF"),
    ],
)
def test_texts(tmp_path: Path, content: bytes, expected: list[str] | str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    check(path, expected)


def zst_long(content: bytes) -> bytes:
    """Packed as by zstd --long=31, as large dumps are."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


def zst_dictionary(content: bytes) -> bytes:
    samples: list[Any] = [
        json.dumps({"id": i, "text": f"sample {i * i} of the text {i % 7}"}).encode() for i in range(2000)
    ]
    return zst(content, dict_data=zstandard.train_dictionary(1024, samples))


def tar(content: bytes) -> bytes:
    out, member = io.BytesIO(), tarfile.TarInfo("inner.txt")
    member.size = len(content)
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner.txt", content)
    return out.getvalue()


TEXT = b"some text\nand more"
SKIPPED_FRAME = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
ARCHIVE = "is a binary file, not text; it is an archive: unpack it, and name the folder"


def broken(content: bytes) -> bytes:
    """With another checksum."""
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", gz(TEXT), [TEXT.decode()]),
        ("a.txt.gz", zst(TEXT), [TEXT.decode()]),
        ("a.txt.bz2", bz2.compress(TEXT), [TEXT.decode()]),
        ("a.xz", lzma.compress(TEXT), [TEXT.decode()]),
        ("a", zst(TEXT), [TEXT.decode()]),
        ("a.jsonl", gz(ROWS), ["a", "b"]),
        ("a.jsonl.xz", lzma.compress(ROWS), ["a", "b"]),
        ("a.jsonl.zst", zst_long(ROWS), ["a", "b"]),
        ("a.gz", gz(b"one ") + gz(b"two"), ["one two"]),
        ("a.bz2", bz2.compress(b"one ") + bz2.compress(b"two"), ["one two"]),
        ("a.xz", lzma.compress(b"one ") + lzma.compress(b"two"), ["one two"]),
        ("a.zst", zst(b"one ") + SKIPPED_FRAME + zst(b"two"), ["one two"]),
        ("a.zst", SKIPPED_FRAME + zst(TEXT), [TEXT.decode()]),
        ("a.gz", gz(TEXT) + b"\0" * 512, [TEXT.decode()]),
        ("a.gz", gz(b"\xef\xbb\xbfabc"), ["abc"]),
        ("a.gz", gz(TEXT) + b"garbage", "is damaged or cut short"),
        ("a.gz", gz(TEXT)[:-9], "is damaged or cut short"),
        ("a.gz", broken(gz(TEXT)), "is damaged or cut short (CRC check failed"),
        ("a.bz2", bz2.compress(TEXT)[:-9], "is damaged or cut short"),
        ("a.xz", lzma.compress(TEXT)[:-9], "is damaged or cut short"),
        ("a.xz", broken(lzma.compress(TEXT)), "is damaged or cut short"),
        ("a.zst", zst(TEXT)[:-3], "is damaged or cut short"),
        ("a.zst", zst_dictionary(ROWS), "unpack it first, with its dictionary: zstd -d -D"),
        ("a.gz", TEXT, "is damaged or cut short (Not a gzipped file"),
        ("a.xz", TEXT, "is damaged or cut short"),
        ("a.gz", b"", "is empty"),
        ("a.zst", b"", "is empty"),
        ("a.gz", gz(b""), "is empty"),
        ("a.txt.gz.gz", gz(gz(TEXT)), "it is packed twice: unpack it once"),
        ("a.gz", gz(zst(TEXT)), "it is packed twice: unpack it once"),
        ("a.zip", zipped(TEXT), ARCHIVE),
        ("a.docx", zipped(TEXT), ARCHIVE),
        ("a.tar", tar(TEXT), ARCHIVE),
        ("a.tar.gz", gz(tar(TEXT)), ARCHIVE),
        ("a.tar.zst", zst(tar(TEXT)), ARCHIVE),
        ("a.parquet.gz", gz(b"PAR1\0"), "it is packed Parquet: unpack it"),
    ],
    ids=short,
)
def test_packed_files(tmp_path: Path, name: str, content: bytes, expected: list[str] | str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    check(path, expected)


NAMES = [
    "with space.txt",
    "new\nline.txt",
    "-dash.txt",
    ".hidden.txt",
    "a[1]*?.txt",
    "~",
    "$HOME",
    "é.txt",
    "e\u0301",
    "%s",
]
NOT_UTF8 = os.fsdecode(b"caf\xe9.txt")


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF8], ids=ascii)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Prepared as a file, in a folder of that name, and into one; a damaged one is named in one line."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in" / name
    folder.mkdir(parents=True)
    (folder / name.removeprefix(".")).write_text("some words " * 20)
    (tmp_path / name).write_text("some words " * 20)
    assert read(name) == ["some words " * 20]
    assert read(folder) == ["some words " * 20]
    meta = prepare(PrepareArgs(source=(name,), out=Path("out", name), tokenizer="bytes", workers=1))
    data = open_dataset(Path("out", name))
    assert data.meta == meta
    assert data.meta.settings["source"] == [name]
    (tmp_path / name).write_text("")
    error = refused_here("prepare", "--out", "new", "--", name, cwd=tmp_path)
    assert error == f"error: {name} is empty".replace("\n", " ")


def test_a_name_that_is_not_utf8_as_a_command_prints_it(tmp_path: Path) -> None:
    (tmp_path / NOT_UTF8).write_text("some words " * 20)
    out, _ = run_here("prepare", NOT_UTF8, "--out", NOT_UTF8 + ".d", "--tokenizer=bytes", cwd=tmp_path)
    assert f"gpt_jax train --data.dir '{NOT_UTF8}.d'\n" in out


def loops(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text("b")
    (folder / "deep" / "loop").symlink_to("..")
    (folder / "self").symlink_to(".")
    (folder / "again").symlink_to("deep")


def outside(folder: Path) -> None:
    other = folder.parent / "other"
    (other / "deeper").mkdir(parents=True)
    (other / "deeper" / "c.txt").write_text("c")
    (other / "back").symlink_to(folder)
    (folder / "link").symlink_to(other)
    (folder / "twice").symlink_to(other / "deeper")


def dangling(folder: Path) -> None:
    for name in ("gone1", "gone2"):
        (folder / name).symlink_to("nowhere")
    (folder / "circle").symlink_to("circle")


def special(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "s"))
    server.close()


def archives(folder: Path) -> None:
    (folder / "a.zip").write_bytes(zipped(TEXT))
    (folder / "b.tar.gz").write_bytes(gz(tar(TEXT)))
    (folder / "empty").write_bytes(b"")
    (folder / "utf16.txt").write_text("text", encoding="utf-16")


@pytest.mark.parametrize(
    ("make", "expected", "notes"),
    [
        (loops, ["a", "b"], []),
        (outside, ["a", "c"], []),
        (dangling, ["a"], ["passed over 3 dangling links, such as texts/circle"]),
        (special, ["a"], ["passed over 2 pipes, sockets or devices, such as texts/pipe"]),
        (archives, ["a"], ["passed over 4 empty or binary files, such as texts/a.zip"]),
    ],
)
def test_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    expected: list[str],
    notes: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    make(tmp_path / "texts")
    assert read("texts") == expected
    assert capsys.readouterr().err.splitlines() == [f"texts: {note}" for note in notes]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_does_not_depend_on_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    """A folder that two links name has its place where the first of them has it."""
    for name in ("texts/m.txt", "other/z.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    for link in ("a", "x"):
        (tmp_path / "texts" / link).symlink_to(tmp_path / "other")
    walk = os.walk

    def in_order(*args: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, subfolders, names in walk(*args, **options):
            subfolders.sort(reverse=backwards)
            yield parent, subfolders, names

    monkeypatch.setattr(os, "walk", in_order)
    assert read(tmp_path / "texts") == ["other/z.txt", "texts/m.txt"]


def test_files_that_cannot_be_opened_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may read all files, so the error is made."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    open_path = Path.open

    def refuse(path: Path, *args: Any) -> Any:
        if path.name in ("a", "c"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, *args)

    monkeypatch.setattr(Path, "open", refuse)
    assert read(tmp_path) == ["b"]
    assert f"passed over 2 files that cannot be opened, such as {tmp_path / 'a'}\n" in capsys.readouterr().err
    check(tmp_path / "a", "cannot be read (Permission denied)")


def test_globs_tell_what_they_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone").symlink_to("nowhere")
    assert read("*") == ["a"]
    assert capsys.readouterr().err.splitlines() == [
        "*: passed over 1 dangling link, such as gone",
        "*: passed over 1 folder, which ** would go into, such as x",
    ]
    assert read("**") == ["a", "b"]
    assert capsys.readouterr().err == "**: passed over 1 dangling link, such as gone\n"
    check(tmp_path / "gone", "is a dangling link, to nowhere")
