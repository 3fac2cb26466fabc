"""Odd records, in JSON and Parquet: each is read as it should be, or refused in one line that says why."""

import bz2
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data import formats
from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError
from gpt_jax.system import command_line
from tests.odd.corpus import ROWS, check, gz, read, short, zst

CHOOSE = (
    f"choose one of its fields with: {command_line('prepare', 'SOURCE', '--out', 'DIR', '--text-field', 'FIELD')}; "
    "they are: "
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b'\n{"text": "a"}\n\n \t\n{"text": "b"}', ["a", "b"], id="blank lines, no newline at the end"),
        pytest.param(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], id="byte order mark and CRLF"),
        pytest.param(b'{"text": null}\n{"text": ""}\n{"text": "a"}', ["a"], id="null and empty"),
        pytest.param(b'{"text": "a", "text": "b"}', ["b"], id="a key twice: the last, as everywhere in Python"),
        pytest.param(b'{"x": NaN, "y": -Infinity, "text": "a"}', ["a"], id="NaN elsewhere"),
        pytest.param(b'{"n": %d, "text": "a"}' % 2**70, ["a"], id="2**70"),
        pytest.param(b'{"x": %s0%s, "text": "a"}' % (b"[" * 500, b"]" * 500), ["a"], id="500 lists in each other"),
        pytest.param(b'{"text": "\\ud83d\\ude42 \\u0000 \\u2028\\n"}', ["🙂 \0 \u2028\n"], id="escapes"),
        pytest.param('{"text": "a\u2028b\x85"}'.encode(), ["a\u2028b\x85"], id="separators that end no line"),
        pytest.param(b'{"t\\u0065xt": "a"}', ["a"], id="an escaped key"),
        pytest.param(
            b'[\n {"text": "a"},\n {"text": "b"}\n]\n', ["a", "b"], id="an array under the name of JSON Lines"
        ),
        pytest.param(b'{"text": "a",}', "line 1 is not JSON", id="trailing comma"),
        pytest.param(b'{"text": "a"}\n{"text": "b"},\n', "line 2 is not JSON (Extra data", id="comma after the row"),
        pytest.param(b'{"text": "a"} {"text": "b"}', "line 1 is not JSON (Extra data", id="two rows on a line"),
        pytest.param(b"{'text': 'a'}", "line 1 is not JSON", id="single quotes"),
        pytest.param(b'# rows\n{"text": "a"}', "line 1 is not JSON", id="comment"),
        pytest.param(b'{"text": "a"}\n{"text": "b', "line 2 is not JSON (Unterminated string", id="cut short"),
        pytest.param(
            b'{"text": "a\nb"}', "line 1 is not JSON (Invalid control character", id="newline within a string"
        ),
        pytest.param(b'{"text": "a\tb"}', "line 1 is not JSON (Invalid control character", id="tab within a string"),
        pytest.param(b'{"body": "a", "meta": {"id": 1}}', f"{CHOOSE}body, meta, meta.id", id="no such field"),
        pytest.param(b"{}", f"has no field 'text'; {CHOOSE}(there", id="no field"),
        pytest.param(b'{"text": 5}', "line 1: 'text' is not text but of type int", id="number"),
        pytest.param(b'{"text": NaN}', "line 1: 'text' is not text but of type float", id="NaN"),
        pytest.param(b'{"text": true}', "line 1: 'text' is not text but of type bool", id="bool"),
        pytest.param(b'{"text": ["a"]}', "line 1: 'text' is not text but of type list", id="list"),
        pytest.param(b'{"text": {"a": 1}}', "line 1: 'text' is not text but of type dict", id="object"),
        pytest.param(b'{"text": "a"}\nnull', "line 2 is not a JSON object", id="null row"),
        pytest.param(b'{"text": "a"}\n"b"', "line 2 is not a JSON object", id="string row"),
        pytest.param(b'{"text": "ab\\udfff"}', "line 1: character 2 of 'text' is half of a surrogate", id="surrogate"),
        pytest.param(b'{"text": "caf\xe9"}', "line 1 is not UTF-8 text: byte 13 of the line is 0xe9", id="latin-1"),
        pytest.param(b'{"text": "a"}'.decode().encode("utf-16"), "is a binary file, not text; it looks", id="UTF-16"),
        pytest.param(b'{"n": %s, "text": "a"}' % (b"9" * 5000), "line 1 is not JSON (Exceeds the limit", id="long int"),
        pytest.param(b"[" * 100_000, "line 1 is not JSON", id="100,000 lists in each other"),
        pytest.param(b'{"x": ' * 100_000, "line 1 is not JSON", id="100,000 objects in each other"),
    ],
)
def test_json_lines(tmp_path: Path, content: bytes, expected: list[str] | str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    check(path, expected)


PRETTY = json.dumps({"id": 1, "text": "a"}, indent=2).encode()
SETTINGS = b'{\n  "compilerOptions": {"strict": true}\n}\n'
UNLIKE = (
    "1 file like JSON or tables, not records with a field 'text' (see prepare --text-field), read as text, such as "
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c4.json.gz", gz(ROWS), ["a", "b"]),
        ("a.json", ROWS, ["a", "b"]),
        ("a.txt", ROWS, ["a", "b"]),
        ("a", b"\xef\xbb\xbf\n" + ROWS, ["a", "b"]),
        ("a.JSONL", ROWS, ["a", "b"]),
        ("a.json", b'{"text": "a"}', ["a"]),
        ("a.json", PRETTY, ["a"]),
        ("a.json", PRETTY + b"\n" + PRETTY, ["a", "a"]),
        ("a.json", b'[{"text": "a"}, {"text": null}, {"text": "b"}]', ["a", "b"]),
        ("a.json.zst", zst(json.dumps([{"text": "你" * n} for n in range(99)], indent=1).encode()), None),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "record 2 is not JSON: '{' follows the one before"),
        ("a.json", b'[{"text": "a"}, 5]', "record 2 is not a JSON object with a field 'text'"),
        ("a.json", b'[{"text": "a"},]', "record 2 is not JSON (Expecting value)"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "is cut short: its list of records does not end"),
        ("a.json", b'[{"text": "a"}, {"text": "b', "record 2 is not JSON (Unterminated string"),
        ("a.json", b'[{"text": "a"}] []', "record 2 is not JSON: '[' follows the one before"),
        ("a.json", b'[{"text": "a"}, {"text": "caf\xe9"}]', "is not UTF-8 text"),
        (
            "a.json",
            b'[{"body": "a"}]',
            f"record 1 has no field 'text'; {CHOOSE}body",
        ),
        ("a.json", b'{"body": "a"}\n{"body": "b"}', f"line 1 has no field 'text'; {CHOOSE}body; ''"),
        ("a.json", ROWS + b'{"text": "c"', "line 3 is not JSON"),
        ("a.csv", b'id,text\n1,"a"\n', "is a table with a column 'text'; convert it to JSON Lines or Parquet"),
        ("a.tsv", b"id\ttext\n1\ta\n", "is a table with a column 'text'; convert it to JSON Lines or Parquet"),
        ("A.CSV", b'id,text\n1,"a"\n', "is a table with a column 'text'; convert it to JSON Lines or Parquet"),
        ("A.Tsv.Bz2", bz2.compress(b"id\ttext\n1\ta\n"), "is a table with a column 'text'; convert it to JSON Lines"),
        ("A.NdJson", b"no json", "line 1 is not JSON"),
        ("A.GZ", b"no gzip", "is damaged or cut short (Not a gzipped file"),
        ("A.PARQUET", b"no parquet", "cannot be read as Parquet"),
        ("a.csv", b"id,body\n1,a\n", UNLIKE),
        ("tsconfig.json", SETTINGS, UNLIKE),
        ("map.json", b'{"version": 3, "sources": []}\n', UNLIKE),
        ("words.json", b'["a", "b"]', UNLIKE),
        ("broken.json", b'{"a": 1, "text": }', UNLIKE),
        ("a.md", b'{"text": "an example line"}\n\nand prose\n', UNLIKE),
        ("a.md", PRETTY + b"\nis how it looks: {}", UNLIKE),
        ("a.json", b'{"text": "a"}' + PRETTY + b'{"text": "b', "record 3 is not JSON (Unterminated string"),
        ("a.json", PRETTY + b"," + PRETTY, "record 2 is not JSON (Expecting value)"),
        ("a.json", PRETTY + PRETTY[:-2], "record 2 is not JSON ("),
        ("a.json", PRETTY + PRETTY + b"prose", "record 3 is not a JSON object with a field 'text'"),
        ("a.tex", b"{\\bf Bold} text", [r"{\bf Bold} text"]),
        ("a.py", b"{1: 2}\n{3: 4}\n", ["{1: 2}\n{3: 4}\n"]),
        ("a.md", b"[1] A reference\n[2] Another\n", ["[1] A reference\n[2] Another\n"]),
        ("a.txt", b"id,text\n1,a\n", ["id,text\n1,a\n"]),
    ],
    ids=short,
)
def test_records_under_any_name(
    tmp_path: Path, name: str, content: bytes, expected: list[str] | str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if expected == UNLIKE:
        check(path, [content.decode()])
        assert capsys.readouterr().err == f"{path}: {UNLIKE}{path}\n"
    else:
        check(path, ["你" * n for n in range(1, 99)] if expected is None else expected)
        assert isinstance(expected, str) or capsys.readouterr().err == ""


def test_without_a_field_every_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    check(path, [ROWS.decode()], field="")


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"meta": {"text": "a"}}, "meta.text", ["a"]),
        ({"meta": {"deep": {"text": "a"}}}, "meta.deep.text", ["a"]),
        ({"meta.text": "a", "meta": {"text": "b"}}, "meta.text", ["a"]),
        ({"meta": None}, "meta.text", []),
        ({"meta": {"text": None}}, "meta.text", []),
        (
            {"meta": {"title": "a"}},
            "meta.text",
            f"has no field 'meta.text'; {CHOOSE}m",
        ),
        ({"meta": "a"}, "meta.text", "has no field 'meta.text'"),
        ({f"f{i}": i for i in range(99)}, "text", "f18, f19, ..."),
    ],
    ids=short,
)
def test_nested_fields_of_json(tmp_path: Path, row: Any, field: str, expected: list[str] | str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    check(path, expected, field)


def columns() -> dict[str, Any]:
    pa = pytest.importorskip("pyarrow")
    return {
        "meta": pa.array([{"text": "a", "deep": {"text": "x"}}, None, {"text": None, "deep": None}]),
        "bytes": pa.array([b"a", None, "é".encode()], pa.binary()),
        "large": pa.array(["a", "", "b"], pa.large_string()),
        "view": pa.array(["a", None, "b"], pa.string_view()),
        "words": pa.array(["a", "b", "a"]).dictionary_encode(),
        "fixed": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)),
        "nothing": pa.nulls(3),
        "latin": pa.array([b"a", b"b", b"caf\xe9"], pa.binary()),
        "list": pa.array([["a"], ["b"], []]),
        "time": pa.array([1, 2, 3], pa.timestamp("s")),
        "dot.ted": pa.array(["a", "b", "c"]),
        "dot": pa.array([{"ted": "x"}] * 3),
    }


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("meta.text", ["a"]),
        ("meta.deep.text", ["x"]),
        ("bytes", ["a", "é"]),
        ("large", ["a", "b"]),
        ("view", ["a", "b"]),
        ("words", ["a", "b", "a"]),
        ("fixed", ["ab", "cd", "ef"]),
        ("nothing", []),
        ("dot.ted", ["a", "b", "c"]),
        ("latin", "row 3: byte 3 of 'latin' is 0xe9: no UTF-8"),
        ("list", "row 1: 'list' is not text but of type list"),
        ("time", "row 1: 'time' is not text but of type datetime"),
        ("meta", "row 1: 'meta' is not text but of type dict"),
        (
            "meta.title",
            f"has no column 'meta.title'; {CHOOSE}meta, meta.text, meta.d",
        ),
        ("bytes.text", "has no column 'bytes.text'"),
        ("text", f"has no column 'text'; {CHOOSE}meta, meta.text, meta.deep, bytes"),
    ],
    ids=short,
)
@pytest.mark.parametrize("name", ["a.parquet", "named otherwise"])
def test_parquet(tmp_path: Path, name: str, field: str, expected: list[str] | str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns()), tmp_path / name)
    check(tmp_path / name, expected, field)


def test_odd_parquet_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    check(path, [])
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    check(path, ["a"])  # The first, as pandas and datasets take it.
    pq.write_table(pa.table({"text": ["a"]}), path)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], b"PAR1", b"", b"no Parquet", gz(b"text")):
        path.write_bytes(content)
        check(path, "cannot be read as Parquet" if content[:2] != b"\x1f\x8b" else ["text"])


ROW = st.dictionaries(st.sampled_from(["text", "id", ""]), st.none() | st.text(max_size=9) | st.integers(), max_size=3)
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    st.recursive(st.none() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5).map(
        lambda v: json.dumps(v).encode()
    ),
    st.binary(max_size=12),
    st.sampled_from([b"", b" ", b"\r", b"{", b"[", b'{"text":', b"\xef\xbb\xbf", b"\\ud800", b'{"text": "\\ud800"}']),
)


def reference(content: bytes) -> list[str] | None:
    """The texts of JSON Lines, read in the plainest way; None where they are not as they should be."""
    texts = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line.decode())["text"]
                texts.append("" if text is None else text)
                texts[-1].encode()
            except (ValueError, LookupError, TypeError, AttributeError):
                return None
    return [text for text in texts if text]


def read_or_refuse(path: Path) -> list[str] | None:
    """The documents of a file; None if it is refused, in one line that names it."""
    try:
        return read(path)
    except UserError as e:
        message = str(e)
    assert str(path) in message
    assert "\n" not in message
    return None


@settings(max_examples=300)
@given(lines=st.lists(LINE, max_size=4), end=st.sampled_from([b"", b"\n"]), cut=st.integers(0, 200))
def test_json_lines_fuzzed(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, cut: int) -> None:
    """Under its own name, as the plainest reading; under any other, records or a text, or an error of one line."""
    content = (b"\n".join(lines) + end)[: 2 * cut]
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK_BYTES", 16)
        path.write_bytes(content)
        expected, is_binary = reference(content), b"\0" in content or content.startswith(b"%PDF-")
        found = read_or_refuse(path)
        is_list = content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")  # Read as such.
        if content not in (b"", b"\xef\xbb\xbf") and not is_binary and not is_list:
            assert found == expected
        other = path.rename(path.with_suffix(".txt"))
        assert read_or_refuse(other) in (None, expected, [content.decode("utf-8-sig", errors="replace")])


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b",".join([b'{"text": "%s"}' % (b"x" * 99)] * 30_000) + b"]",
        b'{"text": "%s"}\n' % (b"x" * 99) * 30_000,
        b'{"data": [' + b'{"a": [1, 2, 3]}, ' * 200_000,
        b'{"text": "' + b"x" * (4 << 20),
        b" " * (4 << 20),
    ],
    ids=["array", "lines", "one long object", "cut short", "spaces"],
)
def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """3 MB and more in at most 1.5 MB, in blocks and records of at most 64 KiB."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 64 << 10)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gz(content))
    del content
    tracemalloc.start()
    try:
        for block in open_corpus([str(path)]).blocks(lambda _: None):
            assert len(block.text) <= 64 << 10
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()
