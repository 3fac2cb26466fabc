"""Stop strings end a text at the first token with which it contains one, whatever the tokens are pieces of."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from gpt_jax.sample.generate import Row
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.published import byte_level, llama

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "byte_level": lambda: load_tokenizer(byte_level()),
    "llama": lambda: load_tokenizer(llama()),  # Spells rare characters, and newlines, in tokens of one byte.
}
TEXTS = ["hello world\n", "\n\n", "语言", "a\n语\nb", "🙂", "Ünï\n", "END", "\n", "é\n"]
PROMPT = "The"


def said(tokenizer: Tokenizer, tokens: Sequence[int], stop: str) -> tuple[list[int], str, str]:
    """The tokens that a row takes, its text, and why it ended."""
    row = Row(tokenizer.encode(PROMPT), tokenizer, Settings(max_new_tokens=len(tokens), stop=(stop,)))
    streamed = "".join(row.add(token, -1.0) for token in tokens)
    assert streamed == row.result.text
    return row.result.tokens, row.result.text, row.result.finish_reason


def plainly(tokenizer: Tokenizer, tokens: Sequence[int], stop: str) -> tuple[list[int], str, str]:
    """The same by decoding all tokens anew after each of them."""
    prompt = tokenizer.encode(PROMPT)
    text = ""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(prompt + [*tokens[:n]]).removeprefix(PROMPT)
        if stop in text:
            return [*tokens[:n]], text[: text.index(stop)], "stop"
    return [*tokens], text, "length"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stop", ["\n", "\n\n", "语", "\nb", "lo w", "ld\n", "ND", "🙂", "never"])
def test_the_first_token_that_completes_a_stop_string_is_the_last(name: str, stop: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for text in (*TEXTS, "".join(TEXTS)):
        tokens = tokenizer.encode(text)
        assert said(tokenizer, tokens, stop) == plainly(tokenizer, tokens, stop)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_any_tokens(name: str) -> None:
    """Also of those that are no text: bytes that follow no rule of UTF-8, alone and within runs of them."""
    tokenizer = TOKENIZERS[name]()
    text_ids = {i for text in TEXTS for i in tokenizer.encode(text)}
    some_ids = [
        i for i in range(tokenizer.vocab_size) if i not in {*tokenizer.special_tokens.values(), *tokenizer.stop_ids}
    ]
    ids = st.sampled_from(sorted(text_ids)) | st.sampled_from(some_ids)

    @given(st.lists(ids, min_size=1, max_size=12), st.integers(0, 30), st.integers(1, 3))
    def same(tokens: list[int], start: int, length: int) -> None:
        text = plainly(tokenizer, tokens, "never in it")[1].replace("\ufffd", "")
        stop = text[start : start + length] or "\n"
        assert said(tokenizer, tokens, stop) == plainly(tokenizer, tokens, stop)

    same()


@pytest.mark.parity
@pytest.mark.parametrize("folder", [byte_level, llama], ids=["byte_level", "llama"])
def test_it_is_where_transformers_stops(folder: Callable[[], Path]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(folder()), transformers.AutoTokenizer.from_pretrained(folder())
    for stop in ("\n", "lo w", "ld\n", "ND", "\n\n", "语"):
        criteria = transformers.StopStringCriteria(theirs, stop)
        for text in (*TEXTS, "".join(TEXTS)):
            prompt, tokens = ours.encode(PROMPT), ours.encode(text)
            ends = (n for n in range(1, len(tokens) + 1) if criteria(torch.tensor([prompt + tokens[:n]]), None)[0])
            assert len(said(ours, tokens, stop)[0]) == next(ends, len(tokens)), (stop, text)
