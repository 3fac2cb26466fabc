"""Tokenizer files that are odd or damaged: read as their references read them, or refused in one line."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.published import gguf_tokenizer
from tests.commands import refused_here, run_here
from tests.llama_cpp import TEXTS
from tests.published import TEXT, bert, byte_level, gpt2, llama, random_texts
from tests.tokenizer.test_published import byte_level_fields, llama_fields

Change = Callable[[Path], object]
BOM = b"\xef\xbb\xbf"
CONFIG = "tokenizer_config.json"
MODEL = json.loads((byte_level() / "tokenizer.json").read_bytes())["model"]
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def write(name: str, content: Any) -> Change:
    """Another content of a file: bytes, a text, or what JSON writes."""
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def rules(**parts: Any) -> Change:
    """Other parts of tokenizer.json."""

    def change(old: bytes) -> bytes:
        definition = json.loads(old)
        if "model" in parts:
            parts["model"] = {**definition["model"], **parts["model"]}
        return json.dumps({**definition, **parts}).encode()

    return edit("tokenizer.json", change)


def vocabulary(**tokens: Any) -> Change:
    """More tokens in vocab.json, or others in place of its own (None: without one)."""

    def change(old: bytes) -> bytes:
        ids = {**json.loads(old), **tokens}
        return json.dumps({token: i for token, i in ids.items() if i is not None}).encode()

    return edit("vocab.json", change)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def more_tokens(**ids: Any) -> Change:
    return rules(model={"vocab": {**MODEL["vocab"], **ids}})


def added_token(content: str, i: int, **flags: bool) -> Change:
    own = json.loads((byte_level() / "tokenizer.json").read_bytes())["added_tokens"]
    return rules(added_tokens=[*own, {"id": i, "content": content, **FLAGS, **flags}])


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
UNKNOWN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<zz>", "type_id": 0}}]}
WORDS = {"vocab": {"the": 0, "<unk>": 1, "</s>": 2, "world": 3}, "unk_token": "<unk>"}

SAME: dict[str, tuple[Callable[[], Path], Change]] = {
    "merges as texts": (byte_level, rules(model={"merges": [" ".join(merge) for merge in MODEL["merges"]]})),
    "no merges": (byte_level, rules(model={"merges": []})),
    "an id beyond the others": (byte_level, more_tokens(zz=700)),
    "an id twice": (byte_level, more_tokens(zz=599)),
    "no decoder": (byte_level, rules(decoder=None)),
    "no rules at all": (byte_level, rules(decoder=None, pre_tokenizer=None)),
    "truncation": (
        byte_level,
        rules(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
    ),
    "an added token": (byte_level, added_token("<think>", 600)),
    "an added token that strips": (byte_level, added_token("<think>", 600, lstrip=True, rstrip=True)),
    "an added token of one word": (byte_level, added_token("hello", 600, single_word=True)),
    "an added token without text": (byte_level, added_token("", 600)),
    "NFC": (byte_level, rules(normalizer={"type": "NFC"})),
    "lowercase": (byte_level, rules(normalizer={"type": "Lowercase"})),
    "stripped": (byte_level, rules(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})),
    "words": (
        byte_level,
        rules(
            model={"type": "WordLevel", **WORDS}, pre_tokenizer={"type": "Whitespace"}, decoder=None, added_tokens=[]
        ),
    ),
    "an unknown token twice": (byte_level, rules(model={"unk_token": "<|endoftext|>", "fuse_unk": True})),
    "eos as an object": (byte_level, write(CONFIG, {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}})),
    "keys twice": (byte_level, write(CONFIG, '{"eos_token": "<|im_end|>", "eos_token": "<|endoftext|>"}')),
    "merges.txt from Windows": (gpt2, edit("merges.txt", lambda b: b.replace(b"\n", b"\r\n"))),
    "merges.txt without a version": (gpt2, edit("merges.txt", lambda b: b.removeprefix(b"#version: 0.2\n"))),
    "merges.txt empty": (gpt2, write("merges.txt", "")),
    "a merge twice": (gpt2, edit("merges.txt", lambda b: b + b.split(b"\n")[1] + b"\n")),
    "merges in another order": (gpt2, edit("merges.txt", lambda b: b"\n".join(b.split(b"\n")[-2:0:-1]))),
    "vocab.json with a gap": (gpt2, vocabulary(zz=700)),
    "a byte without a token": (
        gpt2,
        both(
            vocabulary(**{token: None for token in MODEL["vocab"] if "q" in token}),
            edit("merges.txt", lambda b: b"\n".join(line for line in b.split(b"\n") if b"q" not in line)),
        ),
    ),
    "vocab.txt from Windows": (bert, edit("vocab.txt", lambda b: b.replace(b"\n", b"\r\n"))),
    "vocab.txt without a last newline": (bert, edit("vocab.txt", lambda b: b.rstrip(b"\n"))),
    "capital letters": (bert, write(CONFIG, {"tokenizer_class": "BertTokenizer", "do_lower_case": False})),
    "accents": (bert, write(CONFIG, {"tokenizer_class": "BertTokenizer", "strip_accents": False})),
}  # fmt: skip


def changed(source: Callable[[], Path], change: Change, target: Path) -> Path:
    shutil.copytree(source(), target, dirs_exist_ok=True)
    change(target)
    return target


@pytest.mark.parity
@pytest.mark.parametrize(("source", "change"), SAME.values(), ids=SAME)
def test_it_encodes_as_in_transformers(source: Callable[[], Path], change: Change, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = changed(source, change, tmp_path)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, *random_texts()[:150], "a <think> hello, hellos the world"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), repr(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


REFUSED: dict[str, tuple[Callable[[], Path], Change, str]] = {
    "empty": (byte_level, write("tokenizer.json", ""), "Expecting value"),
    "null": (byte_level, write("tokenizer.json", "null"), 'neither a JSON object of "type": "bytes" nor'),
    "no model": (byte_level, write("tokenizer.json", {}), 'neither a JSON object of "type": "bytes" nor'),
    "a model that is null": (byte_level, write("tokenizer.json", {"model": None}), "refuses it"),
    "zeros": (byte_level, write("tokenizer.json", bytes(100)), "Expecting value"),
    "half of a file": (byte_level, edit("tokenizer.json", lambda b: b[: len(b) // 2]), "Expecting|Unterminated"),
    "a byte order mark": (byte_level, edit("tokenizer.json", lambda b: BOM + b), "refuses it"),
    "UTF-16": (byte_level, edit("tokenizer.json", lambda b: b.decode().encode("utf-16")), "can't decode byte 0xff"),
    "an unknown model": (byte_level, rules(model={"type": "BPF"}), "refuses it"),
    "no vocabulary": (byte_level, rules(model={"vocab": None}), "refuses it"),
    "a vocabulary that is a list": (byte_level, rules(model={"vocab": ["a"]}), "expected a map"),
    "a negative id": (byte_level, more_tokens(zz=-1), "expected u32"),
    "an id that is a text": (byte_level, more_tokens(zz="5"), "expected u32"),
    "an id of 33 bits": (byte_level, more_tokens(zz=2**32), "expected u32"),
    "an id of 31 bits": (byte_level, more_tokens(zz=2**31), "has 601 tokens, and ids up to 2147483648"),
    "a merge of an unknown token": (byte_level, rules(model={"merges": [["q", "zq"]]}), "`zq` out of vocabulary"),
    "a merge of one token": (byte_level, rules(model={"merges": [["q"]]}), "refuses it"),
    "an added token without a name": (byte_level, rules(added_tokens=[{"id": 0}]), "content"),
    "added tokens that are a dict": (byte_level, rules(added_tokens={"<a>": 600}), "of another type"),
    "an unknown pre-tokenizer": (byte_level, rules(pre_tokenizer={"type": "Nope"}), "refuses it"),
    "a pre-tokenizer that is a list": (byte_level, rules(pre_tokenizer=[]), "refuses it"),
    "an expression that is none": (
        byte_level,
        rules(pre_tokenizer={**SPLIT, "pattern": {"Regex": "("}}),
        "parenthesis",
    ),
    "an unknown normalizer": (byte_level, rules(normalizer={"type": "Nope"}), "refuses it"),
    "an unknown decoder": (byte_level, rules(decoder={"type": "Nope"}), "refuses it"),
    "an unknown token before texts": (
        byte_level,
        rules(post_processor={**UNKNOWN, "pair": [], "special_tokens": {}}),
        "its post_processor names <zz>, which it does not define",
    ),
    "no end": (
        byte_level,
        both(
            rules(added_tokens=[], model={"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}),
            write("generation_config.json", {}),
        ),
        "it has no token that ends a text; name one as eos_token",
    ),
    "an end that is a list": (byte_level, write(CONFIG, {"eos_token": ["</s>"]}), r"eos_token is \['</s>'\] in a file"),
    "an end that is a number": (byte_level, write(CONFIG, {"eos_token": 2}), "eos_token is 2 in a file beside it"),
    "a start without a name": (
        byte_level,
        write("special_tokens_map.json", {"bos_token": {}}),
        "bos_token is {} in a f",
    ),
    "settings that are a list": (byte_level, write(CONFIG, []), "tokenizer_config.json beside it is not a JSON object"),
    "settings in half": (byte_level, write(CONFIG, '{"eos'), "tokenizer_config.json beside it is damaged"),
    "a map that is a list": (
        byte_level,
        write("special_tokens_map.json", []),
        "special_tokens_map.json beside it is n",
    ),
    "special tokens that are a number": (byte_level, write(CONFIG, {"extra_special_tokens": 5}), "of another type"),
    "no merges.txt": (gpt2, lambda folder: (folder / "merges.txt").unlink(), "merges.txt, which belongs to vocab.json"),
    "merges.txt of three": (gpt2, edit("merges.txt", lambda b: b + b"a b c\n"), "merges do not fit its vocabulary"),
    "merges.txt of unknown tokens": (gpt2, edit("merges.txt", lambda b: b + b"zz zz\n"), "merges do not fit its vocab"),
    "merges.txt in UTF-16": (gpt2, edit("merges.txt", lambda b: b.decode().encode("utf-16")), "can't decode byte"),
    "vocab.json that is a list": (gpt2, write("vocab.json", ["a"]), "it is not a JSON object of ids by token"),
    "vocab.json without ids": (gpt2, vocabulary(zz="600"), "it is not a JSON object of ids by token"),
    "vocab.json with a negative id": (gpt2, vocabulary(zz=-1), "it is not a JSON object of ids by token"),
    "vocab.json with half an id": (gpt2, vocabulary(zz=0.5), "it is not a JSON object of ids by token"),
    "vocab.json with an id twice": (gpt2, vocabulary(zz=599), "two of its tokens have the same id"),
    "vocab.json that is empty": (gpt2, write("vocab.json", {}), "its merges do not fit its vocabulary"),
    "vocab.json without an end": (
        gpt2,
        vocabulary(**{"<|endoftext|>": None, "<x>": 0}),
        "it has no token that ends a text; name one as eos_token",
    ),
    "added tokens with a gap": (gpt2, write("added_tokens.json", {"<a>": 605}), "<a> should have id 605"),
    "tokenizer.model in half": (llama, edit("tokenizer.model", lambda b: b[: len(b) // 2]), "or damaged"),
    "tokenizer.model without its end": (llama, edit("tokenizer.model", lambda b: b[:-1]), "or damaged"),
    "tokenizer.model that is a text": (llama, write("tokenizer.model", "hello"), "or damaged"),
    "a pointer to a large file": (
        llama,
        write("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
        "or d",
    ),
    "vocab.txt of another kind": (bert, write("vocab.txt", "a\nb\n"), "it is not the vocabulary of a BERT"),
    "vocab.txt in Latin-1": (bert, edit("vocab.txt", lambda b: b + b"caf\xe9\n"), "can't decode byte 0xe9"),
}


@pytest.mark.parametrize(("source", "change", "told"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_one_line(source: Callable[[], Path], change: Change, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load_tokenizer(changed(source, change, tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "change", "text"),
    [
        (gpt2, edit("merges.txt", lambda b: BOM + b), "the q"),
        (gpt2, edit("vocab.json", lambda b: b.decode().encode("utf-16")), "the q"),
        (bert, edit("vocab.txt", lambda b: BOM + b), "the model"),
        (byte_level, edit(CONFIG, lambda b: BOM + b), "the q"),
        (byte_level, write(CONFIG, {"eos_token": {"content": "<|endoftext|>"}}), "the q"),
        (byte_level, rules(model={"dropout": 0.9}), "the world is encoded as always"),
        (byte_level, write("generation_config.json", {"eos_token_id": [2.0, "x", None, True, 10**9, 0]}), "the q"),
    ],
    ids=["merges.txt", "vocab.json", "vocab.txt", CONFIG, "eos as an object", "dropout", "ids to stop at"],
)
def test_what_transformers_refuses_or_makes_random_is_read_as_meant(
    source: Callable[[], Path], change: Change, text: str, tmp_path: Path
) -> None:
    tokenizer, expected = load_tokenizer(changed(source, change, tmp_path)), load_tokenizer(source())
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.end_of_text == expected.end_of_text


def test_of_a_token_that_stands_twice_the_last_counts(tmp_path: Path) -> None:
    """As in BERT's own code. In transformers, it is one or the other by chance."""
    assert load_tokenizer(changed(bert, edit("vocab.txt", lambda b: b + b"the\n"), tmp_path)).encode("the") == [128]


def test_an_added_token_that_gets_another_id_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(changed(byte_level, added_token("<far>", 900), tmp_path))
    assert tokenizer.encode("<far>") == [600]  # As in transformers.
    assert caplog.messages == ["<far> has the id 600, not 900, as added_tokens in tokenizer.json has it"]


def trained(target: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of other options, in the file tokenizer.model."""
    defaults = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    with (target / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT[:20_000].splitlines()), model_writer=file, **{**defaults, **options}
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model"))


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {**IDENTITY, "byte_fallback": True},
        IDENTITY,
        {**IDENTITY, "model_type": "unigram"},
        {**IDENTITY, "byte_fallback": True, "user_defined_symbols": ["<think>", "\n", "the"]},
        {**IDENTITY, "byte_fallback": True, "control_symbols": ["<ctrl>", "the"]},
        {**IDENTITY, "byte_fallback": True, "add_dummy_prefix": False},
        {**IDENTITY, "byte_fallback": True, "bos_id": -1},
        {**IDENTITY, "byte_fallback": True, "unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
        {**IDENTITY, "byte_fallback": True, "unk_surface": "??"},
        {"normalization_rule_name": "identity", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nfkc_cf", "model_type": "unigram", "remove_extra_whitespaces": False},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items() if IDENTITY.get(name) != value),
)
def test_sentencepiece_models_encode_as_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = trained(tmp_path, **options), load_tokenizer(tmp_path)
    identity = options["normalization_rule_name"] == "identity"
    for text in (*TEXTS, *random_texts()[:150], "a <think> b<think>c the", "<think>x", "the\n\nworld", " ", "a ", "\t"):
        # The library drops some combining marks, and joins some clusters, when it normalizes by a table.
        if identity or (text.isascii() and "\r" not in text):
            assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"treat_whitespace_as_suffix": True}, "whose tokens end with their spaces, which is not supported"),
        ({"model_type": "word"}, "a SentencePiece model of words or characters; bpe and unigram are supported"),
        ({"model_type": "char"}, "a SentencePiece model of words or characters; bpe and unigram are supported"),
        ({"eos_id": -1}, "it has no token that ends a text; name one as eos_token"),
    ],
    ids=str,
)
def test_sentencepiece_models_that_are_not_supported(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    trained(tmp_path, **options)
    with pytest.raises(UserError, match=told):
        load_tokenizer(tmp_path)


N = len(MODEL["vocab"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pre": None}, "tokenizer.ggml.pre is None, which is not known"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre is 'falcon', which is not known"),
        ({"model": "bert"}, "tokenizer of model 'bert'; gpt2 and llama are supported"),
        ({"tokens": []}, "its merges do not fit its vocabulary"),
        ({"tokens": [1, 2]}, "its merges do not fit its vocabulary"),
        ({"tokens": ["a"] * N}, "its merges do not fit its vocabulary"),
        ({"merges": ["a b c"]}, "its merges do not fit its vocabulary"),
        ({"merges": [5]}, "its merges do not fit its vocabulary"),
        ({"token_type": [1] * (N - 1)}, "is damaged"),
        ({"eos_token_id": -2}, "a special token has the id -2, and there are 600 tokens"),
        ({"bos_token_id": 600}, "a special token has the id 600, and there are 600 tokens"),
        ({"eos_token_id": -1, "eot_token_id": -1}, None),
        ({"eos_token_id": 2**32 - 1, "eot_token_id": 2**32 - 1}, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_vocabularies_of_gguf_files(changes: dict[str, Any], told: str | None) -> None:
    fields = byte_level_fields(**changes)
    if told is None:  # No token, as llama.cpp writes it: the one with a known name ends texts.
        assert gguf_tokenizer(fields).end_of_text == 0
        return
    with pytest.raises(UserError, match=told) as caught:
        gguf_tokenizer(fields)
    assert "\n" not in str(caught.value)


def test_sentencepiece_of_gguf_files_without_types_or_scores() -> None:
    fields, expected = llama_fields(), load_tokenizer(llama())
    del fields["tokenizer.ggml.token_type"]
    tokenizer = gguf_tokenizer({**fields, "tokenizer.chat_template": 5})
    assert tokenizer.chat_template is None
    assert tokenizer.encode(" a 🙂\n") == expected.encode(" a 🙂\n")
    for scores in ([0.0], ["x"] * 1000, [float("nan")] * 1000):
        with pytest.raises(UserError, match="the tokenizer in the GGUF file is damaged"):
            gguf_tokenizer(llama_fields(scores=scores))
    del fields["tokenizer.ggml.scores"]
    with pytest.raises(UserError, match=r"the GGUF file has no tokenizer\.ggml\.scores"):
        gguf_tokenizer(fields)


def test_a_gguf_file_of_a_vocabulary_alone_is_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write as write_gguf

    file = write_gguf(tmp_path / "vocab.gguf", {}, llama_fields())
    (tmp_path / "a.txt").write_text("A text for the model. " * 50)
    out, _ = run_here("prepare", tmp_path / "a.txt", "--out", tmp_path / "data", "--tokenizer", file)
    assert "vocabulary           1,000 tokens" in out
    assert load_tokenizer(tmp_path / "data").fingerprint == gguf_tokenizer(llama_fields()).fingerprint
    file.write_bytes(file.read_bytes()[:2000])
    told = refused_here("prepare", tmp_path / "a.txt", "--out", tmp_path / "other", "--tokenizer", file)
    assert "vocab.gguf" in told
    told = refused_here("prepare", tmp_path / "a.txt", "--out", tmp_path / "other", "--tokenizer", tmp_path / "no.gguf")
    assert "no.gguf" in told
