"""`prepare` of a corpus that is cleaned is `prepare` of what cleaning keeps, for any number of workers."""

import json
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("rensa")

from gpt_jax.config import CleanConfig
from gpt_jax.data import cleaned
from gpt_jax.data.corpora import python_docs
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import Meta
from gpt_jax.errors import UserError
from tests.commands import refused_here, run_here

CLEAN = CleanConfig(normalize="nfkc", dedup="minhash", min_words=60)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def corpus() -> list[str]:
    """Documents, some of which are short, or alike, or in another Unicode form."""
    sections = [section for document in python_docs() for section in document.split("\n\n\n")][:120]
    edited = [section.replace("the", "a", 1) + "\ufb01" for section in sections[10:30]]
    return [*sections, "short", *edited, *sections[:10], *("too short " * n for n in range(1, 6))]


def prepared(source: Path, out: Path, n_workers: int = 1, clean: CleanConfig | None = None) -> Meta:
    clean = clean or CleanConfig()
    return prepare(PrepareArgs(source=(str(source),), out=out, tokenizer="bytes", clean=clean, workers=n_workers))


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_it_is_the_corpus_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus()
    meta = prepared(write(tmp_path / "all.jsonl", texts), tmp_path / "one", clean=CLEAN)
    monkeypatch.setattr(cleaned, "TASK_BYTES", 5000)
    assert prepared(tmp_path / "all.jsonl", tmp_path / "many", 3, CLEAN) == meta
    assert arrays(tmp_path / "one") == arrays(tmp_path / "many")

    report = meta.report["clean"]
    removed = {rule: entry["documents"] for rule, entry in report["removed"].items()}
    assert removed["fewer than 60 words"] >= 6
    assert removed["equal to a document before"] + removed["similar to a document before, by 0.80 or more"] >= 25
    assert report["documents"] == len(texts) == report["kept_documents"] + sum(removed.values())
    assert meta.train.documents + meta.val.documents == report["kept_documents"]

    kept = [unicodedata.normalize("NFKC", text) for text in texts]
    kept = [text for i, text in enumerate(kept) if len(text.split()) >= 60 and text not in kept[:i]]
    again = prepared(write(tmp_path / "kept.jsonl", kept), tmp_path / "kept", clean=CLEAN)
    assert again.source_fingerprint == meta.source_fingerprint
    assert arrays(tmp_path / "kept") == arrays(tmp_path / "one")


@pytest.mark.parametrize("texts", ["ab", "abcd"])
def test_a_source_that_is_changed_between_two_readings_is_an_error(texts: str) -> None:
    assert list(cleaned.kept("abc", bytes([1, 0, 1]))) == ["a", "c"]
    with pytest.raises(UserError, match="a source was changed while it was read; prepare it again"):
        list(cleaned.kept(texts, bytes([1, 0, 1])))


def test_flags_and_what_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "all.jsonl", corpus())
    flags = ["prepare", source, "--out", tmp_path / "out", "--tokenizer", "bytes"]
    _, err = run_here(*flags, "--dedup", "exact", "--min-words", "60")
    assert "removed: fewer than 60 words" in err
    assert "removed: equal to a document before" in err
    assert "document 142 (document 1): " in err
    error = refused_here(*flags, "--force", "--languages", "xx")
    assert "languages = ('xx',) is not possible: it must be some of " in error
    _, err = run_here(*flags, "--force", "--min-words", "100000", status=1)
    assert err.splitlines()[-1] == "error: cleaning removed every document; see above for the reasons"
