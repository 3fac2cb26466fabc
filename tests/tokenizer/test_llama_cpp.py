"""Tokenizers give what llama.cpp gives on the texts of its own tests, and every text comes back, in streams, too."""

import itertools
from pathlib import Path

import pytest
import sentencepiece

pytest.importorskip("tokenizers")

from gpt_jax.interop.load import named_tokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.llama_cpp import TEXTS, VOCABULARIES, texts
from tests.published import llama, random_texts


def assert_every_text_comes_back(tokenizer: Tokenizer, all_texts: list[str]) -> None:
    """At once, token by token, and where the first tokens are the prompt, of any length."""
    begin = [i for i in (tokenizer.begin_of_text,) if i is not None]
    for text in all_texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        for n in {0, 1, 2, len(ids) // 2, max(0, len(ids) - 1)} & {*range(len(ids) + 1)}:
            decoder = tokenizer.decoder(after=begin + ids[:n])
            continuation = "".join([*map(decoder.push, ids[n:]), decoder.flush()])
            if "\ufffd" not in tokenizer.decode(ids[:n]):  # Else the prompt ends within a character.
                assert tokenizer.decode(ids[:n]) + continuation == text, (ids, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in ("command-r", "phi-3", "refact") else [])
        for name in VOCABULARIES
    ],
)
def test_vocabularies_encode_as_llama_cpp_does(llama_cpp_vocabularies: Path, name: str) -> None:
    file = llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf"
    tokenizer = named_tokenizer(str(file))
    assert tokenizer is not None
    answers = Path(f"{file}.out").read_text().splitlines()
    ours = texts(Path(f"{file}.inp").read_bytes().decode())
    assert ours == TEXTS
    assert len(ours) == 46
    for text, answer in itertools.zip_longest(ours, answers):
        assert tokenizer.encode(text) == [int(i) for i in answer.split()], repr(text)
    assert_every_text_comes_back(tokenizer, TEXTS)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_models_encode_as_sentencepiece_does(model_type: str) -> None:
    """Also what begins with a space, which transformers' Llama loses, and what looks like a special token."""
    ours = load_tokenizer(llama(model_type))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama(model_type) / "tokenizer.model"))
    for text in (*TEXTS, *random_texts(), "a<s>b<0x41>c", " <s>", "▁", "▁a", "a▁b", " ▁a"):
        assert ours.encode(text) == theirs.encode(text), repr(text)
    assert_every_text_comes_back(ours, [*TEXTS, *random_texts()[:500]])
