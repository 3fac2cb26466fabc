"""Records are what the file holds, whatever it is; what is broken ends reading, or is counted with its place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import records
from gpt_jax.data.formats import read_records
from gpt_jax.data.records import RecordError, Skipped
from gpt_jax.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=4), JSON, min_size=1, max_size=3), min_size=1, max_size=5)
FILES: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress("\n\n".join(map(json.dumps, rows)).encode()),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "b.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
}


@pytest.mark.parametrize("name", FILES)
@given(rows=ROWS)
def test_records_are_the_objects_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("records") / name
    path.write_bytes(FILES[name](rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", 16)
        found = list(read_records(path))
    assert [record.value for record in found] == rows
    assert len({record.where for record in found}) == len(rows)
    positions = [record.position for record in found]
    assert positions == sorted(positions)
    assert 0 < positions[-1] <= path.stat().st_size


def test_a_record_says_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [record.where for record in read_records(path)] == [f"{path}, line 1", f"{path}, line 3"]
    path = path.rename(tmp_path / "a.json")
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert [record.where for record in read_records(path)] == [f"{path}, record 1", f"{path}, record 2"]


def test_of_parquet_the_columns_that_are_named_are_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    rows = [{"text": f"{i}", "meta": {"a": i, "b": None}, "messages": [{"role": "user"}] * (i % 3)} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [record.value for record in read_records(path)] == rows
    assert [r.value for r in read_records(path, ["text", "meta.a", "c"])] == [
        {"text": row["text"], "meta": {"a": i}} for i, row in enumerate(rows)
    ]
    assert [r.value for r in read_records(path, ["c"])] == [{}] * 100
    last = list(read_records(path))[-1]
    assert last[1:] == (f"{path}, row 100", path.stat().st_size)


BROKEN = b'{"a": 1}\nno json\n"text"\n{"a": "\xff"}\n{"a": "' + b"x" * 99 + b'"}\n{"a": 2}\n' + b"x" * 128


def test_the_first_broken_line_ends_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BROKEN)
    reading = read_records(path)
    assert next(reading).value == {"a": 1}
    with pytest.raises(RecordError, match=r"a.jsonl, line 2 is not JSON \(Expecting value") as caught:
        next(reading)
    assert caught.value.reason == "no JSON"


def test_broken_lines_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_jax.data.formats.MAX_LINE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(BROKEN)
    skipped = Skipped()
    assert [record.value for record in read_records(path, on_broken=skipped)] == [{"a": 1}, {"a": 2}]
    assert skipped.counts == {"no JSON": 1, "no JSON object": 1, "no UTF-8": 1, "too long a line": 2}
    assert f"{path}, line 3 is not a JSON object" in skipped.examples["no JSON object"]
    assert [example.split(" is ")[0] for example in skipped.examples["too long a line"]] == [
        f"{path}, line 5",
        f"{path}, line 7",
    ]
    assert skipped.lines()[0].startswith(f"passed over 2 records (too long a line): {path}, line 5 is longer than")


def test_of_many_errors_the_first_are_told() -> None:
    skipped = Skipped()
    for number in range(1000):
        skipped(RecordError("odd", f"line {number}"))
    assert skipped.lines() == ["passed over 1,000 records (odd): line 0; line 1; line 2"]


def test_of_a_list_only_whole_values_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 5, {"a": 2}, {"a" 3}]')
    skipped = Skipped()
    with pytest.raises(UserError, match="record 4 is not JSON"):
        list(read_records(path, on_broken=skipped))
    assert skipped.examples == {"no JSON object": [f"{path}, record 2 is not a JSON object"]}
    path.write_text('{"a":\n1}\n{"a":\n2} x {"a": 3}')
    with pytest.raises(UserError, match="record 3 is not JSON: 'x' follows the one before"):
        list(read_records(path, on_broken=Skipped()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text", "a.txt holds no records; JSON Lines, a JSON array of objects, and Parquet do"),
        ("a.csv", b"a,b\n1,2", "a.csv holds no records"),
        ("a.bin", b"\0\1", "a.bin holds no records"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-3], "a.jsonl.gz is damaged or cut short"),
        ("a.json", b'{"a": 1} {', "record 2 is not JSON"),
        ("a.json", b'[{"a": 1}', "a.json is cut short"),
        ("a.json", b'["a"]', "record 1 is not a JSON object"),
    ],
)
def test_what_holds_no_records_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
