"""What is told of a data folder, against counting by hand."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import inspect
from gpt_jax.data.inspect import (
    count_tokens,
    document_lengths,
    facts,
    histogram,
    left_out,
    most_frequent,
    percentiles,
    token_text,
)
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import open_dataset
from gpt_jax.errors import UserError
from gpt_jax.interop.load import named_tokenizer
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from tests.data.splits import Split, splits

some_lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


@given(some_lengths)
def test_every_document_is_in_one_bin(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths))
    assert [b.longest + 1 for b in bins[:-1]] == [b.shortest for b in bins[1:]]
    for b in bins:
        inside = [n for n in lengths if b.shortest <= n <= b.longest]
        assert (b.documents, b.tokens, b.longest) == (len(inside), sum(inside), 2 * b.shortest - 1)
    assert bins[0].documents
    assert bins[-1].documents
    assert sum(b.documents for b in bins) == len(lengths)


@given(some_lengths)
def test_percentiles_are_lengths_of_documents(lengths: list[int]) -> None:
    found, n = percentiles(np.array(lengths)), len(lengths)
    for percent, length in found.items():
        assert length in lengths
        assert sum(m <= length for m in lengths) >= percent / 100 * n
        assert sum(m < length for m in lengths) <= percent / 100 * n
    assert (found[0], found[100]) == (min(lengths), max(lengths))


@given(splits, st.integers(1, 50))
def test_every_token_is_counted(split: Split, chunk: int) -> None:
    """In chunks of any size; and of those that are to be learnt, apart."""
    split.ids %= 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "CHUNK_TOKENS", chunk)
        counts = count_tokens(split, 9)
    assert counts.all.tolist() == [split.ids.tolist().count(i) for i in range(9)]
    assert (counts.learnt is not None) == split.masked
    if counts.learnt is not None:
        assert counts.learnt.tolist() == [split.ids[split.mask].tolist().count(i) for i in range(9)]
    expected = Counter(split.ids.tolist())
    found = most_frequent(counts.all, 3)
    assert [n for _, n in found] == [n for _, n in expected.most_common(3)]
    assert all(expected[i] == n for i, n in found)


@given(splits)
def test_lengths_are_those_of_the_documents(split: Split) -> None:
    assert document_lengths(split).tolist() == np.diff([*split.document_starts.tolist(), len(split)]).tolist()


def test_ids_beyond_the_vocabulary_are_an_error() -> None:
    with pytest.raises(UserError, match="the token id 5 is not among the 5; prepare the data again"):
        count_tokens(Split([5]), 5)


def test_tokens_are_shown_with_their_spaces(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    shown = [token_text(tokenizer, token) for token in (*tokenizer.encode(" \n\x1ba"), tokenizer.end_of_text)]
    assert shown == ["' '", r"'\n'", r"'\x1b'", "'a'", "<|endoftext|>"]
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 100)
    prepare(PrepareArgs(source=(str(tmp_path / "a.txt"),), out=tmp_path / "out", vocab_size=290))
    trained = load_tokenizer(tmp_path / "out")
    [token] = trained.encode(" the")
    assert token_text(trained, token) == "' the'"


def test_a_space_before_a_token_is_shown(llama_cpp_vocabularies: Path) -> None:
    """Though decoding that token alone would leave it out, as that of a text's first one."""
    tokenizer = named_tokenizer(str(llama_cpp_vocabularies / "ggml-vocab-llama-spm.gguf"))
    assert tokenizer is not None
    assert [token_text(tokenizer, token) for token in tokenizer.encode("the\n")] == ["' the'", r"'\n'"]


def test_the_facts_say_what_was_left_out(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    records = [{"messages": messages}] * 8 + [{"messages": messages[:1]}] * 2 + [{"messages": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = (str(tmp_path / "a.jsonl"),)
    prepare(PrepareArgs(source=source, out=tmp_path / "out", tokenizer="bytes", val_fraction=0.25))
    data = open_dataset(tmp_path / "out")
    told = facts(data)
    assert told["format"] == "chat"
    assert told["source"] == source[0]
    assert told["tokenizer"].startswith("tokenizer.json, 261 tokens, a chat template of ")
    tokens, documents = len(data.train), len(data.train.document_starts)
    learnt = documents * len("answer.")  # With the end of the turn.
    assert told["training"] == (
        f"{documents} conversations with {documents} answers, {documents} examples, {tokens} tokens, "
        f"{learnt} ({learnt / tokens:.1%}) to be learnt, {6 / 7:.2f} bytes a token"
    )
    assert told["left out: no answer to learn"] == "2 records"
    assert sum(name.startswith("left out: ") for name in told) == 2
    clean = {"documents": 1234, "removed": {"fewer than 5 words": {"documents": 1000}}}
    cleaned = dataclasses.replace(data.meta, report={"clean": clean})
    assert left_out(cleaned) == {"removed: fewer than 5 words": "1,000 of 1,234 documents"}
    assert left_out(dataclasses.replace(data.meta, report={})) == {"left out": "nothing that prepare counts"}
