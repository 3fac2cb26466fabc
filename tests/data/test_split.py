"""The split loses no text, depends on the text alone, and is close to what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.formats import Block, cut_document
from gpt_jax.data.split import ByDocument, ByPosition, choose_split

DOCUMENTS = st.lists(st.text(st.sampled_from("ab \n你"), min_size=1, max_size=50), max_size=20)


def blocks_of(documents: list[str]) -> list[Block]:
    return [block for document in documents for block in cut_document(document.encode(), 0)]


@given(documents=DOCUMENTS, fraction=st.floats(0, 1))
def test_documents_stay_whole_and_where_they_are(documents: list[str], fraction: float) -> None:
    split = ByDocument(fraction)
    labelled = list(split(blocks_of(documents)))
    assert [block for _, block in labelled] == blocks_of(documents)
    where = {block.text: name for name, block in labelled}
    assert {block.text: name for name, block in split(blocks_of(documents[::-1]))} == where


def test_documents_of_many_blocks_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_jax.data.formats.BLOCK_BYTES", 10)
    for i in range(20):
        assert len({name for name, _ in ByDocument(0.5)(blocks_of([f"{i} " + "word " * 20]))}) == 1


def test_the_share_is_close_for_many_documents() -> None:
    labelled = ByDocument(0.1)(blocks_of([f"document {i}" for i in range(10_000)]))
    assert 900 < sum(name == "val" for name, _ in labelled) < 1100


@given(documents=DOCUMENTS, train_bytes=st.integers(0, 500))
def test_the_end_of_the_text_is_cut_off(documents: list[str], train_bytes: int) -> None:
    labelled = list(ByPosition(train_bytes)(blocks_of(documents)))
    parts = {name: [block for n, block in labelled if n == name] for name in ("train", "val")}
    train, val = (b"".join(block.text for block in parts[name]) for name in ("train", "val"))
    assert (train + val).decode() == "".join(documents)
    assert len(train) <= train_bytes
    assert "val" not in [name for name, _ in labelled[: len(parts["train"])]]
    for name in ("train", "val"):
        assert not parts[name] or parts[name][-1].ends_document
    ends = sum(block.ends_document for _, block in labelled)
    cut_within = val and train and not any("".join(documents[:i]).encode() == train for i in range(len(documents)))
    assert ends == len(documents) + bool(cut_within)


@pytest.mark.parametrize(
    ("fraction", "val_bytes", "by_document"),
    [(0.1, 100, True), (0.1, 140, True), (0.1, 0, False), (0.1, 40, False), (0.1, 1000, False), (0.9, 1000, False)],
)
def test_the_position_decides_where_documents_would_be_far_off(
    fraction: float, val_bytes: int, by_document: bool
) -> None:
    split = choose_split(fraction, 1000, val_bytes)
    assert split == (ByDocument(fraction) if by_document else ByPosition(round(1000 * (1 - fraction))))
