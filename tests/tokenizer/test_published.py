"""Tokenizers from the metadata of GGUF files, and added tokens of folders from the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.published import gguf_tokenizer
from tests.published import byte_level, llama, random_texts


def byte_level_fields(**changes: Any) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in `byte_level`."""
    model = json.loads((byte_level() / "tokenizer.json").read_bytes())["model"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(model["vocab"]) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
    }
    return {**fields, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


def llama_fields(**changes: Any) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in `llama`."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama() / "tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {**fields, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


def test_byte_level_bpe_is_that_of_the_folder() -> None:
    tokenizer, expected = gguf_tokenizer(byte_level_fields()), load_tokenizer(byte_level())
    for text in random_texts()[:500]:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens == expected.special_tokens
    assert (tokenizer.end_of_text, tokenizer.stop_ids, tokenizer.begin_of_text) == (0, {0, 2}, None)


def test_sentencepiece_is_that_of_the_folder() -> None:
    tokenizer, expected = gguf_tokenizer(llama_fields()), load_tokenizer(llama())
    for text in random_texts()[:500]:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == expected.decode(ids)
    assert (tokenizer.begin_of_text, tokenizer.end_of_text) == (1, 2)
    assert gguf_tokenizer(llama_fields(add_bos_token=False)).begin_of_text is None


def test_no_space_is_added_where_the_file_says_so() -> None:
    tokenizer = gguf_tokenizer(llama_fields(add_space_prefix=False))
    for text in ("the", " the", "  the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("the") != gguf_tokenizer(llama_fields()).encode("the")


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["20", "24", "24", "24"]),
        ("smollm", ["2", "0", "2", "4", "2", "4", "2", "4"]),
        ("qwen2", ["2", "0", "2", "4", "2", "4", "2", "4"]),
        ("llama-bpe", ["20", "2", "4", "24", "24"]),  # Three digits at a time.
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, tokens: list[str]) -> None:
    fields = byte_level_fields(pre=pre)
    vocabulary = [*fields["tokenizer.ggml.tokens"], "20", "24"]
    merges = ["2 0", "2 4", *fields["tokenizer.ggml.merges"]]
    tokenizer = gguf_tokenizer(byte_level_fields(pre=pre, tokens=vocabulary, merges=merges, token_type=None))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("20242424")] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian', which is not known; supported are codeshell, "),
        ({"model": "rwkv"}, "tokenizer of model 'rwkv'; gpt2 and llama are supported"),
        ({"token_type": [1]}, "the tokenizer in the GGUF file is damaged"),
        ({"eos_token_id": 10**6}, "the tokenizer in the GGUF file is damaged"),
        ({"tokens": 5}, "the tokenizer in the GGUF file is damaged"),
        ({"token_type": 5}, "the tokenizer in the GGUF file is damaged"),
        ({"merges": 5}, "the tokenizer in the GGUF file is damaged"),
        ({"model": "llama", "scores": 5}, "the tokenizer in the GGUF file is damaged"),
        ({"eos_token_id": "<eos>"}, "the tokenizer in the GGUF file is damaged"),
        ({"merges": ["a"]}, "the tokenizer in the GGUF file is damaged: its merges do not fit its vocabulary"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_used_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(byte_level_fields(**changes))


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_a_missing_field_is_named(key: str) -> None:
    fields = byte_level_fields()
    del fields[f"tokenizer.ggml.{key}"]
    with pytest.raises(UserError, match=f"the GGUF file has no tokenizer.ggml.{key}"):
        gguf_tokenizer(fields)


def test_added_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    """As of a Llama model that was made to chat: the tokens are in added_tokens.json, with or without flags."""
    shutil.copy(llama() / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 1000, "<|im_end|>": 1001}')
    flags = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    config = {"added_tokens_decoder": {"1001": flags}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1002
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 1000, "<|im_end|>": 1001}
    assert tokenizer.end_of_text == 1001
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 1000, "<|other|>": 1005}')
    with pytest.raises(UserError, match=r"<\|other\|> should have id 1005"):
        load_tokenizer(tmp_path)


DEEP = "[" * 100_000
TOKEN = {"content": "<|im_end|>", "special": True}


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("added_tokens.json", "[1]", "added_tokens.json beside it is not a JSON object"),
        ("added_tokens.json", '{"<|im_end|>": "a"}', ""),
        ("tokenizer_config.json", {"added_tokens_decoder": [TOKEN]}, ""),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000": {"special": True}}}, "content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000": "<|im_end|>"}}, ""),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000": TOKEN | {"special": "no"}}}, ""),
        ("tokenizer_config.json", DEEP, "tokenizer_config.json beside it is damaged"),
        ("tokenizer.json", DEEP, "tokenizer.json cannot be used as a tokenizer"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_files_of_another_kind_end_in_one_line(tmp_path: Path, file: str, content: Any, told: str) -> None:
    shutil.copy(llama() / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert "cannot be used as a tokenizer" in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
