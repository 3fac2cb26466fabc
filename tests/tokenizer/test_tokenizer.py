"""Tokenizers lose nothing, special tokens never come from text, and streams never show half a character."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import TokenizerType
from gpt_jax.data.corpora import python_docs
from gpt_jax.data.train_tokenizer import train_sentencepiece
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.sentencepiece import WORD, SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer

ENGLISH = "".join(python_docs()[:60])
CHINESE = "人工智能是研究、开发用于模拟人的智能的理论和技术。\n语言模型预测下一个词。\n" * 20


def train(model_type: TokenizerType, vocab_size: int = 1000) -> SentencePieceTokenizer:
    parts = [ENGLISH[i : i + 4000] for i in range(0, len(ENGLISH), 4000)]
    return SentencePieceTokenizer(train_sentencepiece([*parts, CHINESE], model_type, vocab_size))


LOSSLESS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "bpe": train("bpe"), "unigram": train("unigram")}
CHAR = train("char")
EVERY: dict[str, Tokenizer] = {**LOSSLESS, "char": CHAR}

# Any text, and texts of what goes wrong easily: white space, what SentencePiece uses inside, unusual characters.
TRICKY = [" ", "  ", "\n", "\r\n", "\t", "▁", "▅", "⁇", "\0", "\x1f", "<unk>", "<0x41>", *SPECIAL_TOKENS]
TRICKY += [
    "你好",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "ﬁ",
    "①",
    "\ufffd",
    "\ufeff",
    "\u2028",
    "\U0010ffff",
    "word",
    " word",
    "7",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(TRICKY)).map("".join)

each_lossless = pytest.mark.parametrize("tokenizer", LOSSLESS.values(), ids=LOSSLESS)
each = pytest.mark.parametrize("tokenizer", EVERY.values(), ids=EVERY)


@each_lossless
@given(text=TEXT)
def test_decode_is_the_inverse_of_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert not set(ids) & set(tokenizer.special_tokens.values())


@each_lossless
@given(text=TEXT)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
@each
def test_what_it_was_trained_on_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each
@given(data=st.data())
def test_a_stream_adds_up_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = tokenizer.decoder()
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids)


@each_lossless
@given(text=TEXT)
def test_a_stream_shows_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.decoder()
    shown = ""
    for token in tokenizer.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_a_character_that_never_arrives_is_shown_at_the_end() -> None:
    decoder = ByteTokenizer().decoder()
    assert [decoder.push(byte) for byte in "é".encode()] == ["", "é"]
    assert decoder.push("你".encode()[0]) == ""
    assert decoder.flush() == "\ufffd"


@each
def test_special_tokens_have_ids_of_their_own(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert tokenizer.end_of_text == tokenizer.special_tokens[END_OF_TEXT]
    for name, i in tokenizer.special_tokens.items():
        assert tokenizer.decode([i]) == name
        assert i not in tokenizer.encode(name)


@each
def test_half_of_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"character 1 of the text is half of a surrogate pair: '\\ud800'"):
        tokenizer.encode("a\ud800")


@given(text=TEXT)
def test_words_are_tokenised_as_the_whole_text_is(text: str) -> None:
    """The cache of words changes nothing: the ids are SentencePiece's own, but for U+2581, which it makes a space."""
    text = text.replace("▁", "")
    tokenizer = LOSSLESS["bpe"]
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(text) == processor.encode(text)
    assert "".join(WORD.findall(text)) == text


def test_the_cache_of_words_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train("bpe")
    monkeypatch.setattr(type(tokenizer._words), "MAX_WORDS", 10)
    text = " ".join(map(str, range(100))) + " " + "x" * 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer._words) <= 10
    assert max(map(len, tokenizer._words)) <= 32


def test_an_unknown_character_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train("char")
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode("a🙂b")
        tokenizer.encode("a🙃b▁")
    assert tokenizer.decode(ids) == "a\ufffdb"
    assert caplog.messages == ["the vocabulary has no character '🙂': such characters are encoded as <unk>"]


def test_char_has_the_characters_of_the_text() -> None:
    tokenizer = SentencePieceTokenizer(train_sentencepiece(["ab c\n", "\tb\r\n"], "char", 1000))
    assert {tokenizer.decode([i]) for i in range(6, tokenizer.vocab_size)} == set("ab c\n\t\r")
    assert tokenizer.decode(tokenizer.encode("\n\n\tcab \r")) == "\n\n\tcab \r"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_reproducible(model_type: TokenizerType) -> None:
    assert train(model_type).fingerprint == LOSSLESS[model_type].fingerprint


def test_indentation_and_blank_lines_are_short_and_digits_apart() -> None:
    tokenizer = LOSSLESS["bpe"]
    assert len(tokenizer.encode("        ")) == 1
    assert len(tokenizer.encode(".\n\n")) == 1
    assert len(tokenizer.encode("2024")) == 4


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([ENGLISH[:1000]], 50_000, r"vocabulary of 50000 is not possible .* too short to yield more than \d+;"),
        ([ENGLISH[:1000]], 100, r"vocabulary of 100 is not possible .* it needs 3\d\d or more"),
        ([], 1000, "there is no text to train it on"),
    ],
)
def test_impossible_vocabularies_name_the_bound(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, "bpe", vocab_size)


@each
def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    for path in (file, tmp_path):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert np.array_equal(loaded.encode_array(ENGLISH), tokenizer.encode_array(ENGLISH))


def write_other_specials(path: Path) -> None:
    path.write_text(json.dumps({"type": "bytes", "special_tokens": {}}))


def train_elsewhere(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as f:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([ENGLISH[:4000]]),
                model_writer=f,
                vocab_size=100,
                hard_vocab_limit=False,
                minloglevel=2,
                **options,
            )

    return write


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.model", lambda path: None, "there is no tokenizer .*none.model"),
        ("t.model", lambda path: path.write_bytes(b"not a model"), "not a SentencePiece model, or damaged"),
        ("t.model", lambda path: path.write_bytes(b""), "not a SentencePiece model, or damaged"),
        ("t.model", train_elsewhere(model_type="char"), "it is a SentencePiece model of words or characters"),
        ("t.model", train_elsewhere(eos_id=-1), "it has no token that ends a text; name one as eos_token"),
        ("t.json", lambda path: path.write_text("{"), "cannot be used as a tokenizer: Expecting property name"),
        ("t.json", write_other_specials, "its special tokens are not those of this version"),
        (
            "t.json",
            lambda path: path.write_text("[]"),
            'neither a JSON object of "type": "bytes" nor one with a "model"',
        ),
        ("t.json", lambda path: path.write_text('{"type": "words"}'), 'neither a JSON object of "type": "bytes" nor'),
        (
            "folder",
            lambda path: path.mkdir(),
            "there is no tokenizer in .*folder: none of tokenizer.json, tokenizer.mo",
        ),
    ],
)
def test_what_is_no_tokenizer_is_named(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)
