"""Long texts are encoded in parts as the whole would be, by every tokenizer, or not cut at all."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from gpt_jax.data import formats
from gpt_jax.data import texts as texts_module
from gpt_jax.data.formats import cut_document
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import open_dataset
from gpt_jax.evaluate import loss
from gpt_jax.evaluate.loss import Tally, tokenised
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.splitting import GPT2, LLAMA3, QWEN2, TEKKEN
from gpt_jax.tokenizer.tokenizer import Tokenizer, encode_on
from tests.llama_cpp import TEXTS
from tests.published import PUBLISHED, byte_level, llama, random_texts
from tests.tokenizer.test_tokenizer import EVERY as MADE_HERE

SIGNS = [
    "a",
    "b c",
    " ",
    "\n",
    "\n\n",
    "。",
    "你好",
    "!",
    "'s",
    "7",
    "\r\n",
    "\t",
    "x y",
    ".\n",
    "Word",
    "\u3000",
    "<t>",
]


@functools.cache
def texts() -> list[str]:
    rng = random.Random(0)
    return [*TEXTS, "the▁ world▁  ▁ 1", *random_texts()[:200], *("".join(rng.choices(SIGNS, k=20)) for _ in range(400))]


def changed(folder: Callable[[], Path], **changes: Any) -> Callable[[], Tokenizer]:
    """The tokenizer in a folder, with other values in the parts of its tokenizer.json."""

    def make() -> Tokenizer:
        tokenizer = load_tokenizer(folder())
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        rules = tokenizer.rules()
        for part, value in changes.items():
            rules[part] = {**rules["model"], **value} if part == "model" else value
        return HuggingFaceTokenizer(json.dumps(rules).encode(), tokenizer.config())

    return make


def loaded(folder: Callable[[], Path]) -> Callable[[], Tokenizer]:
    return lambda: load_tokenizer(folder())


def made(name: str) -> Callable[[], Tokenizer]:
    return lambda: MADE_HERE[name]


def merged(*pairs: tuple[str, str]) -> dict[str, Any]:
    """The byte-level model with more tokens, which join two others first of all."""
    model = json.loads((byte_level() / "tokenizer.json").read_bytes())["model"]
    for left, right in pairs:
        model["vocab"].setdefault(left + right, len(model["vocab"]))
    return {"vocab": model["vocab"], "merges": [*map(list, pairs), *model["merges"]]}


def added(**flags: Any) -> list[dict[str, Any]]:
    ends = json.loads((byte_level() / "tokenizer.json").read_bytes())["added_tokens"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [*ends, {"id": 600, "content": "<t>", **plain, **flags}]


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PREFIX = {**BYTES, "add_prefix_space": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, TO_SPACE]}
NEWLINES = merged(("Ċ", "Ċ"), ("!", "Ċ"))

CUT: dict[str, Callable[[], Tokenizer]] = {
    **{name: made(name) for name in MADE_HERE},
    **{name: loaded(folder) for name, folder in PUBLISHED.items()},
    "add_prefix_space": changed(byte_level, pre_tokenizer=PREFIX),
    "gpt-2's pattern": changed(byte_level, pre_tokenizer=split(GPT2), model=NEWLINES),
    "llama 3's pattern": changed(byte_level, pre_tokenizer=split(LLAMA3), model=NEWLINES),
    "qwen 2's pattern": changed(byte_level, pre_tokenizer=split(QWEN2), normalizer={"type": "NFC"}, model=NEWLINES),
    "tekken's pattern": changed(byte_level, pre_tokenizer=split(TEKKEN), model=NEWLINES),
    "no pattern": changed(byte_level, pre_tokenizer=BYTES),
    "runs of newlines": changed(byte_level, pre_tokenizer=BYTES, model=NEWLINES),
    "an added token": changed(byte_level, added_tokens=added()),
    "prefix first": changed(llama, pre_tokenizer={**METASPACE, "prepend_scheme": "first"}),
    "prefix always": changed(llama, pre_tokenizer={**METASPACE, "prepend_scheme": "always"}),
    "llama 2's own": changed(llama, pre_tokenizer=None, normalizer=LLAMA2),
    "gemma's": changed(
        llama,
        normalizer=TO_SPACE,
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    ),
    "words of a unigram model": changed(
        lambda: llama("unigram"),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
    ),
}
WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "unigram, unsplit": lambda: load_tokenizer(llama("unigram")),
    "an unknown pattern": changed(byte_level, pre_tokenizer=split(r"\S+ \S+|\s|\S")),
    "a pattern that is cut out": changed(byte_level, pre_tokenizer=split(LLAMA3, behavior="MergedWithNext")),
    "tokens across a space": changed(byte_level, pre_tokenizer=BYTES, model=merged(("!", "Ġ"))),
    "tokens across a newline": changed(byte_level, pre_tokenizer=BYTES, model=merged(("Ċ", "W"))),
    "rstrip": changed(byte_level, added_tokens=added(rstrip=True)),
    "lstrip": changed(byte_level, added_tokens=added(lstrip=True)),
    "an added token with a space": changed(byte_level, added_tokens=added(content="x y")),
    "stripped": changed(byte_level, normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    "compatibility forms": changed(byte_level, normalizer={"type": "NFKC"}),
    "no token for a space": changed(llama, model={"byte_fallback": False}),
}


@pytest.mark.parametrize("make", CUT.values(), ids=CUT)
def test_parts_are_encoded_as_the_whole_is(make: Callable[[], Tokenizer]) -> None:
    """At every place where a text may be cut, whatever follows."""
    tokenizer = make()
    n_cuts = 0
    for text in texts():
        whole, end = tokenizer.encode(text), len(text)
        while end and (cut := tokenizer.cut(text[:end])):
            n_cuts += 1
            assert [*tokenizer.encode(text[:cut]), *encode_on(tokenizer, text[cut:])] == whole, (text[:cut], text[cut:])
            end = cut - (cut == end)
    assert n_cuts > 1000


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_what_may_be_wrong_in_parts_is_not_cut(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert not any(tokenizer.cut(text) for text in texts())


LONG: dict[str, Callable[[], Tokenizer]] = {
    **{name: loaded(folder) for name, folder in PUBLISHED.items()},
    "unigram": lambda: load_tokenizer(llama("unigram")),
    "made here": lambda: MADE_HERE["bpe"],
}


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_a_long_document_is_prepared_and_evaluated_as_a_whole(
    make: Callable[[], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the blocks in which it is read end before newlines, and within words."""
    document = "One line.\n\nAnother line, which is\nlonger.\n" * 12 + "语言模型预测下一个词。" * 30 + "\n语言 ends"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [document, "x y " * 90]))
    monkeypatch.setattr(formats, "BLOCK_BYTES", 40)
    monkeypatch.setattr(texts_module, "TASK_BYTES", 70)
    monkeypatch.setattr(loss, "PIECE_BYTES", 70)
    tokenizer = make()
    prepare(PrepareArgs(source=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", workers=1), tokenizer)
    data = open_dataset(tmp_path / "out")
    [_, *ids] = next(tokenised(cut_document(document.encode(), 0), tokenizer, Tally()))
    assert [i for part in ids for i in part.tolist()] == tokenizer.encode(document)
    begin = [i for i in (tokenizer.begin_of_text,) if i is not None]
    expected = [*begin, *tokenizer.encode(document), tokenizer.end_of_text]
    assert data.train.read(0, len(expected)).tolist() == expected


def test_bytes_are_cut_anywhere() -> None:
    assert ByteTokenizer().cut("语言") == 2
