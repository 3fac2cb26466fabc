"""The loss over data folders and over text as it is, against one window at a time in float64."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import zstandard

from gpt_jax.config import Config, TrainConfig
from gpt_jax.data import formats
from gpt_jax.data.folders import DataFolders
from gpt_jax.data.shards import Dataset, open_dataset
from gpt_jax.data.sources import open_corpus
from gpt_jax.errors import UserError
from gpt_jax.evaluate import loss
from gpt_jax.evaluate.loss import Tally, evaluate_blocks, evaluate_split
from gpt_jax.evaluate.score import Scorer
from gpt_jax.model.gpt import Params
from gpt_jax.placement import Placement
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.train.evaluate import make_evaluate
from tests import tiny
from tests.evaluate.model import CONFIG, MODEL, T, make_params, nats

END = ByteTokenizer().end_of_text
DOCUMENTS = ["one", "a", "two of them, 语言 and 👩‍🚀", "", "three\n" * 30, "no. " * 16]
"""Shorter than a window, of one token, of several, empty, and of exactly four."""


@pytest.fixture(scope="module")
def params() -> Params:
    return make_params()


@pytest.fixture(scope="module")
def scorer(params: Params) -> Scorer:
    return Scorer(MODEL, params, Placement(jax.devices()[:1]), 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data folder whose splits, of several documents, end within a window."""
    return open_dataset(tiny.byte_data(tmp_path_factory.mktemp("data")))


def naive(params: Params, tokens: np.ndarray, context_length: int, stride: int) -> float:
    """Nats of all tokens but the first. Each is predicted in the first window that reaches to it."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = next(s for s in range(0, len(tokens), stride) if target <= s + context_length)
        total += nats(params, tokens[start : target + 1], 1)
    return total


def test_a_split_has_the_loss_that_training_tells(scorer: Scorer, params: Params, data: Dataset) -> None:
    config = Config(model=CONFIG, train=TrainConfig())
    evaluate = make_evaluate(MODEL, Placement(jax.devices()[:1]), DataFolders({"data": data}, config.data), config)
    expected = evaluate(params)
    tally = evaluate_split(scorer, data.val, T, T)
    assert tally.loss == pytest.approx(expected["val_loss"], rel=1e-6)
    assert tally.bits / tally.bytes == pytest.approx(expected["val_bits_per_byte"], rel=1e-6)
    assert (tally.tokens, tally.documents, tally.bytes) == (
        len(data.val) - 1,
        data.meta.val.documents,
        data.meta.val.bytes,
    )
    assert tally.characters is None


@pytest.mark.parametrize(("context_length", "stride"), [(T, T), (T, 5), (T, 1), (7, 7), (7, 3)])
def test_a_split_with_a_stride(
    scorer: Scorer,
    params: Params,
    data: Dataset,
    context_length: int,
    stride: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "PIECE_TOKENS", 100)
    tally = evaluate_split(scorer, data.val, context_length, stride)
    tokens = data.val.read(0, len(data.val))
    assert tally.tokens == len(tokens) - 1
    assert tally.nats == pytest.approx(naive(params, tokens, context_length, stride), rel=1e-6)
    assert tally == evaluate_split(scorer, data.val, context_length, stride)


def test_the_other_split(scorer: Scorer, params: Params, data: Dataset) -> None:
    tokens = data.train.read(0, len(data.train))
    assert evaluate_split(scorer, data.train, T, T).nats == pytest.approx(naive(params, tokens, T, T), rel=1e-6)


def test_devices_do_not_matter(scorer: Scorer, params: Params, data: Dataset) -> None:
    several = evaluate_split(Scorer(MODEL, params, Placement(jax.devices()[:4]), 2), data.val, T, 5)
    assert several.nats == pytest.approx(evaluate_split(scorer, data.val, T, 5).nats, rel=1e-6)


def expected_tally(params: Params, stride: int, start: int = END) -> Tally:
    """Of DOCUMENTS, each on its own."""
    total = Tally(characters=0)
    for document in filter(None, DOCUMENTS):
        tokens = np.array([start, *document.encode()])
        total.nats += naive(params, tokens, T, stride)
        total.tokens += len(tokens) - 1
        total.documents += 1
        total.bytes += len(document.encode())
        total.characters = (total.characters or 0) + len(document)
    return total


def check_tally(got: Tally, expected: Tally) -> None:
    assert got.nats == pytest.approx(expected.nats, rel=1e-6)
    got.nats = expected.nats
    assert got == expected


@pytest.fixture(params=["txt", "jsonl", "jsonl.gz", "jsonl.zst"])
def corpus_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """DOCUMENTS as a user may have them."""
    if request.param == "txt":
        for i, document in enumerate(DOCUMENTS):
            (tmp_path / f"{i}.txt").write_text(document, encoding="utf-8")
        return tmp_path
    path = tmp_path / f"documents.{request.param}"
    text = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS).encode()
    packed = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packed.get(request.param, bytes)(text))
    return path


@pytest.mark.parametrize("stride", [T, 3])
def test_documents_are_scored_each_on_its_own(scorer: Scorer, params: Params, corpus_path: Path, stride: int) -> None:
    tally = evaluate_blocks(scorer, open_corpus([str(corpus_path)]).blocks(lambda n: None), ByteTokenizer(), T, stride)
    check_tally(tally, expected_tally(params, stride))
    assert tally.bits == pytest.approx(tally.nats / np.log(2), rel=1e-12)  # Nothing is left unscored.


def test_a_long_document_is_one_document(
    scorer: Scorer, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    monkeypatch.setattr(formats, "BLOCK_BYTES", 10)
    monkeypatch.setattr(loss, "PIECE_BYTES", 30)
    tally = evaluate_blocks(scorer, open_corpus([str(path)]).blocks(lambda n: None), ByteTokenizer(), T, 5)
    check_tally(tally, expected_tally(params, 5))


def test_a_document_begins_as_the_tokenizer_says(scorer: Scorer, params: Params, tmp_path: Path) -> None:
    class WithBegin(ByteTokenizer):
        begin_of_text = 258

    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    tally = evaluate_blocks(scorer, open_corpus([str(path)]).blocks(lambda n: None), WithBegin(), T, T)
    check_tally(tally, expected_tally(params, T, start=258))


def test_without_text_there_is_no_loss(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(UserError, match="there is no text to evaluate: every document is empty"):
        evaluate_blocks(scorer, open_corpus([str(tmp_path)]).blocks(lambda n: None), ByteTokenizer(), T, T)


def test_a_loss_that_is_no_number_is_told(params: Params, data: Dataset) -> None:
    broken = {**params, "tokens_VD": params["tokens_VD"].at[0].set(np.nan)}
    with pytest.raises(UserError, match="the loss is nan"):
        evaluate_split(Scorer(MODEL, broken, Placement(jax.devices()[:1]), 4), data.val, T, T)
