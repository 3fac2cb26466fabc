"""Datasets of the package `datasets`, saved or as plain files, give their rows; what is not there is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.data.hugging_face import is_dataset, load_dataset
from gpt_jax.data.messages import Conversation, chat
from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError
from tests.data.test_formats import documents

datasets = pytest.importorskip("datasets")

ROWS: list[dict[str, Any]] = [{"text": f"text {i}", "meta": {"id": i, "title": f"title {i}"}} for i in range(150)]
CALLS = [
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    ]
    for arguments in ({"x": 1}, {"y": ["a"]})
]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of datasets of ROWS with a split test of the first two: saved, one split of it, and files."""
    train, test = (datasets.Dataset.from_list(rows) for rows in (ROWS, ROWS[:2]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    train.save_to_disk(tmp_path / "one")
    for name in ("files", "parquet"):
        (tmp_path / name).mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (tmp_path / "files" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.to_parquet(tmp_path / "parquet" / "train.parquet")
    test.to_parquet(tmp_path / "parquet" / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["saved", "one", "files", "parquet", "files,streaming", "parquet,streaming"])
def test_rows_come_in_their_order_with_their_place(folder: Path, name: str) -> None:
    dataset = load_dataset(f"hf:{folder}/{name}")
    records = list(dataset.records())
    assert [record.value for record in records] == ROWS
    assert records[-1].where == f"hf:{folder}/{name}, row 150"
    positions = [record.position for record in records]
    assert positions == sorted(positions)
    assert positions[-1] == dataset.n_bytes
    assert (dataset.n_bytes == 0) == ("streaming" in name)
    expected = [{"meta": row["meta"]} for row in ROWS]
    assert [record.value for record in dataset.records(["meta.title", "no such column"])] == expected


@pytest.mark.parametrize("name", ["saved", "files", "files,streaming"])
def test_splits_are_chosen(folder: Path, name: str) -> None:
    assert [record.value for record in load_dataset(f"hf:{folder}/{name},split=test").records()] == ROWS[:2]


def test_one_saved_split_keeps_its_name(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "one")
    assert len(list(load_dataset(f"hf:{tmp_path}/one,split=test").records())) == 150
    with pytest.raises(UserError, match="without the split 'train'; there are test"):
        load_dataset(f"hf:{tmp_path}/one")


def test_a_part_of_a_split(folder: Path) -> None:
    assert len(list(load_dataset(f"hf:{folder}/files,split=train[:10%],config=default").records())) == 15


def test_a_dataset_is_a_source_of_texts(folder: Path) -> None:
    (folder / "a.txt").write_text("first")
    names = [f"{folder}/a.txt", f"hf:{folder}/saved"]
    for field, word in (("text", "text"), ("meta.title", "title")):
        corpus, steps = open_corpus(names, field), list[int]()
        assert documents(list(corpus.blocks(steps.append))) == ["first", *(f"{word} {i}" for i in range(150))]
        assert sum(steps) == corpus.n_bytes
    with pytest.raises(UserError, match=r"saved, row 1 has no field 'body'; choose one of its fields .*: text, meta"):
        list(open_corpus(names, "body").blocks(lambda _: None))


def test_calls_of_different_arguments_are_read_as_they_are(tmp_path: Path) -> None:
    """`datasets` keeps what has no common type as JSON, which must not be seen."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in CALLS))
    for name in ("files", "files,streaming"):
        records = load_dataset(f"hf:{tmp_path}/{name}").records()
        assert [chat(record.value) for record in records] == [chat({"messages": turns}) for turns in CALLS]


def test_nulls_that_tables_fill_in_are_not_there(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "n"}]
    datasets.Dataset.from_list([{"messages": turns, "tools": None}]).save_to_disk(tmp_path / "saved")
    [record] = load_dataset(f"hf:{tmp_path}/saved").records()
    assert record.value["messages"][0]["name"] is None
    assert chat(record.value) == Conversation(tuple(turns), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("saved,split=valid", "saved is a saved dataset without the split 'valid'; there are train, test"),
        ("one,split=test", "one is a saved dataset without the split 'test'; there are train"),
        ("saved,config=en", "without the configuration 'en'"),
        ("files,split=valid", r'Unknown split "valid". Should be one of \[\'train\', \'test\'\]'),
        ("files,split=valid,streaming", r"Bad split: valid. Available splits: \['train', 'test'\]"),
        ("files,config=en", r"BuilderConfig 'en' not found. Available: \['default'\]"),
        ("files,splits=train", "'splits=train' is no option; the spelling is hf:NAME,split=train"),
        ("files,split", "'split' is no option"),
        ("files,streaming=no", "'streaming=no' is no option"),
        ("none", "cannot be read .*; is the name right, and is there a network?"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_corpus([f"hf:{folder}/{name}"])
    assert str(caught.value).startswith(f"hf:{folder}/{name}")
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_without_a_network_is_named() -> None:
    with pytest.raises(UserError, match=r"^hf:nobody/nothing cannot be read .*; is the name right, and is there a net"):
        load_dataset("hf:nobody/nothing")


@pytest.mark.parametrize("name", ["files", "files,streaming"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"text": "a"}\n{"text" "b"}\n')
    with pytest.raises(UserError, match=r"cannot be read .*JSON parse error") as caught:
        list(load_dataset(f"hf:{tmp_path}/{name}").records())
    assert "\n" not in str(caught.value)


def test_the_package_is_imported_only_for_a_dataset() -> None:
    """It takes more than half a second."""
    code = "import sys, gpt_jax.data.prepare; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:x: this needs the package datasets: pip install 'gpt-jax\[hf\]'"):
        open_corpus(["hf:x"])


def test_a_path_on_the_hub_is_no_dataset() -> None:
    assert is_dataset("hf:a/b")
    assert not is_dataset("hf://datasets/a/b/c.parquet")
    assert not is_dataset("hf")
