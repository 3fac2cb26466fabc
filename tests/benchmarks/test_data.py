"""The part `data`, measured on sources of next to nothing."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import corpora, data
from benchmarks.contest import OURS
from benchmarks.measure import run_command, watched_memory
from benchmarks.presets import Preset, small
from benchmarks.results import Results
from benchmarks.worker import FailedError
from gpt_jax.data.messages import chat
from tests.published import byte_level

MACHINE = {"platform": "cpu", "cores": 2, "devices": 1, "versions": {}, "flags": {}}
SIZES = data.Sizes(
    text=200_000, conversations=100_000, memory=200_000, loader=50_000, documents=2000, vocab_size=400, seconds=0.01
)


def records(path: Path) -> list[dict[str, str]]:
    """Those of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_bring_a_twentieth_of_new_words_each_time(tmp_path: Path) -> None:
    corpora.write_texts(path := tmp_path / "texts.jsonl", 4_000_000)
    assert 4_000_000 <= path.stat().st_size < 4_200_000
    texts = [record["text"].split(" ") for record in records(path)]
    n = len(corpora.python_docs())
    assert len(texts) > 2 * n
    first, second = (
        np.concatenate([np.array(words, object) for words in part]) for part in (texts[:n], texts[n : 2 * n])
    )
    assert np.mean(first == second) == pytest.approx(0.95**2, abs=0.02)


@pytest.mark.parametrize("answer", [1, 3])
def test_conversations_are_questions_about_docstrings(tmp_path: Path, answer: int) -> None:
    corpora.write_conversations(path := tmp_path / "chat.jsonl", 300_000, answer)
    assert 300_000 <= path.stat().st_size < 320_000
    (question, reply), *_ = [chat(record).messages for record in records(path)]
    named = list(corpora.docstrings().items())[:answer]
    assert all(name in question["content"] for _, name in named)
    assert reply["content"].count(" ") == "\n\n".join(text for text, _ in named).count(" ")


def test_documents_have_the_mean_length(tmp_path: Path) -> None:
    corpora.write_documents(path := tmp_path / "documents.jsonl", 20_000, mean=30)
    lengths = [len(record["text"].encode()) + 1 for record in records(path)]
    assert len(lengths) == 20_000
    assert min(lengths) >= 2
    assert sum(lengths) / len(lengths) == pytest.approx(30, rel=0.03)


def test_memory_of_processes_below_is_added_up() -> None:
    below = "import time; a = bytearray(64 << 20); time.sleep(0.5)"
    code = f"import subprocess, sys; a = bytearray(32 << 20); subprocess.run([sys.executable, '-c', {below!r}])"
    with watched_memory(every=0.05) as peak:
        run_command("-c", code)
    assert 64 << 20 < peak.largest < 96 << 20 < peak.all < 160 << 20


def test_a_contestant_that_fails_is_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> data.Row:
        raise FailedError("there is no such command")

    numbers = iter((1, 5, 2))
    row = data.take_turns({"a": lambda: {"s": (n := next(numbers)), "peak_bytes": n}, "b": fails}, 3, "a note")
    assert row == {
        "rounds": 3,
        "contestants": {"a": {"s": {"median": 2, "min": 1, "max": 5}, "peak_bytes": 5}},
        "failed": {"b": "there is no such command"},
        "notes": ["a note"],
    }
    assert "b is out" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_contestants")
def test_a_training_step_consumes_tokens() -> None:
    preset = Preset("nano", small(1, 1, 8, 8, "float32"), batch_size=2, steps=2)
    row = data.train_alone(preset, MACHINE, rounds=2)
    rate = row["contestants"][OURS]["tokens_per_second"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert row["rounds"] == 2


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = shutil.copytree(byte_level(), tmp_path / "published")
    (here := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    corpora.write_conversations(given := tmp_path / "given.jsonl", 100_000)
    results = Results(tmp_path / "machine.json", MACHINE)
    results.put("train/nano", {"contestants": {OURS: {"tokens_per_second": {"median": 1000.0}}}})
    data.run(results, MACHINE, 1, [given], published, SIZES)
    assert results.failed == []
    assert not list(here.iterdir())
    rows = {name: row["contestants"] for name, row in results.rows.items()}
    assert [name.removeprefix("data/") for name in rows] == [
        "train/nano",
        "prepare/text, SentencePiece",
        "prepare/text, bytes",
        "prepare/conversations, SentencePiece",
        "prepare/conversations, published, ChatML",
        "memory/text, 0.00019 GiB",
        "memory/conversations, 0.00019 GiB",
        "loader/1024",
        "loader/64",
        "tiny/2,000 documents",
        "fill/docstrings",
        "fill/conversations",
    ]
    for name, found in rows.items():
        if name.startswith(("data/prepare", "data/memory")):
            assert list(found) in (["1 process", "2 processes"], [OURS])
            assert all(f["peak_bytes"] >= f["largest_bytes"] > 10 << 20 for f in found.values())
            assert all(f["tokens_per_second"] > 0 < f["mb_per_second"] for f in found.values())
        if name.startswith("data/loader"):
            assert len(found) == 5
            assert all(f["times_consumed"] == f["tokens_per_second"] / 1000 > 0 for f in found.values())
        if name.startswith("data/fill"):
            packed = found["best-fit decreasing"]
            assert 0.5 < packed["next_fit"] <= packed["fill"] <= 1
    characters = rows["data/prepare/text, bytes"]["1 process"]
    assert characters["tokens_per_second"] == pytest.approx(1e6 * characters["mb_per_second"], rel=0.1)
    tiny = rows["data/tiny/2,000 documents"]
    assert list(tiny)[:3] == ["`prepare`", "open, pack, first batch", "open, first batch"]
    assert set(tiny) | set(results.rows["data/tiny/2,000 documents"]["failed"]) == {*list(tiny)[:3], "`inspect`"}
