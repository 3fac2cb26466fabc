"""A corpus is read in parts, on which nothing that is written depends."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.config import CleanConfig
from gpt_jax.data import sources, texts, train_tokenizer, tuning
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.sources import open_corpus

WORDS = ["a", "word", "写", "of", "<|end|>", "\n", "learning", "models"]
CLEAN = CleanConfig(normalize="nfc", dedup="exact", min_words=5)
BYTES = {"tokenizer": "bytes"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "texts by document": ("text*.jsonl", {"vocab_size": 280, "val_fraction": 0.2}),
    "texts by position": ("long*.txt", {"vocab_size": 280}),
    "cleaned texts": ("text*.jsonl", {"clean": CLEAN, **BYTES}),
    "conversations": ("chat*.jsonl", {"vocab_size": 280, "skip_broken": True, "val_fraction": 0.2}),
    "conversations by position": ("few*.jsonl", BYTES),
    "cleaned conversations": ("chat*.jsonl", {"clean": CLEAN, "skip_broken": True, "val_fraction": 0.2, **BYTES}),
    "problems": ("problem*.jsonl", BYTES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some sources of each kind, of which the second and the last have nothing in them."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))

    def messages() -> list[dict[str, str]]:
        return [{"role": role, "content": text()} for role in ("user", "assistant")]

    def write(name: str, records: list[dict[str, Any]], more: str = "") -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records) + more)

    repeated = [text() for _ in range(3)]
    for i, n in enumerate((30, 0, 1, 40, 2, 0)):
        written = [*repeated, *(text() for _ in range(n))] if n else [""]
        write(f"text{i}.jsonl", [{"text": text} for text in written])
        chats = [{"messages": messages()} for _ in range(n)]
        write(f"chat{i}.jsonl", chats + chats[:1], '{\n{"messages": 1}\n')
        write(f"problem{i}.jsonl", [{"prompt": text(), "answer": i} for _ in range(n)] or [{"prompt": None}])
        (folder / f"long{i}.txt").write_text(text() * (1 + 20 * (i == 3)))
    for i in range(3):
        write(f"few{i}.jsonl", [{"messages": [{"role": "user", "content": "x" * 50 * i}, messages()[1]]}])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_the_files_do_not_depend_on_the_parts(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does what is said; and the sample for the tokenizer is a small part of the text."""
    files, options = CASES[case]
    args = PrepareArgs(source=(f"{folder}/{files}",), out=tmp_path / "whole", **options)
    for module in (texts, tuning):
        monkeypatch.setattr(module, "SAMPLE_BYTES", 4000)
    monkeypatch.setattr(train_tokenizer, "_SENTENCE_BYTES", 100)
    said = []
    for name, part_bytes in (("whole", 1 << 30), ("three", 3000), ("each", 1)):
        monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
        prepare(dataclasses.replace(args, out=tmp_path / name))
        said.append(capsys.readouterr())
    assert content(tmp_path / "whole") == content(tmp_path / "three") == content(tmp_path / "each")
    assert said[0] == said[1] == said[2]


def test_parts_are_whole_sources_next_to_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus([f"{folder}/text*.jsonl"])
    assert corpus.parts() == [corpus]
    monkeypatch.setattr(sources, "PART_BYTES", corpus.sources[0].n_bytes + 1)
    parts = corpus.parts()
    assert len(parts) == 3
    assert [source for part in parts for source in part.sources] == [*corpus.sources]
    assert [part.first for part in parts] == [0, 2, 4]
    assert [number for part in parts for number, _ in part.each()] == [*range(6)]
    monkeypatch.setattr(sources, "PART_SOURCES", 1)
    assert len(corpus.parts()) == 6
