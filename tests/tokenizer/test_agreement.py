"""Files of a folder that say the same thing, and differ: as in transformers 5, one of them counts, and it is told."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer  # noqa: E402
from gpt_jax.tokenizer.load import load_tokenizer  # noqa: E402
from gpt_jax.tokenizer.splitting import QWEN2  # noqa: E402
from tests.published import byte_level, gpt2, llama, random_texts  # noqa: E402

pytestmark = pytest.mark.parity

BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def folder_of(source: Callable[[], Path], target: Path, changes: dict[str, Any]) -> Path:
    """A copy of a folder in which JSON objects have other values, and other files another content."""
    shutil.copytree(source(), target, dirs_exist_ok=True)
    for name, change in changes.items():
        path = target / name
        old = json.loads(path.read_text()) if path.is_file() else {}
        new = change(old) if callable(change) else old | change if isinstance(change, dict) else change
        path.write_text(new if isinstance(new, str) else json.dumps(new))
    return target


def prefixed(file: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda rules: rules | {"pre_tokenizer": rules["pre_tokenizer"] | {"add_prefix_space": file}}


def qwen2(before: bool) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": before, "trim_offsets": False, "use_regex": False}
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, last]}}


def named(**names: Any) -> dict[str, Any]:
    return {"eos_token": "<|endoftext|>", **names}


CASES: dict[str, tuple[Callable[[], Path], dict[str, Any], str]] = {
    "the map counts before the config": (
        byte_level,
        {CONFIG: named(bos_token="<|im_end|>"), MAP: {"bos_token": {"content": "<|im_start|>"}}},
        "bos_token is <|im_start|>, as special_tokens_map.json has it, not as tokenizer_config.json",
    ),
    "but not before one with added tokens": (
        byte_level,
        {CONFIG: named(bos_token="<|im_end|>", added_tokens_decoder={}), MAP: {"bos_token": "<|im_start|>"}},
        "bos_token is <|im_end|>, as tokenizer_config.json has it, not as special_tokens_map.json",
    ),
    "the end of a text": (
        byte_level,
        {CONFIG: named(), MAP: {"eos_token": "<|im_end|>"}},
        "eos_token is <|im_end|>, as special_tokens_map.json has it, not as tokenizer_config.json",
    ),
    "what begins a text is up to tokenizer.json": (
        byte_level,
        {CONFIG: named(bos_token="<|im_start|>", add_bos_token=False), "tokenizer.json": {"post_processor": BEGINS}},
        "a token begins every text, as tokenizer.json has it, not as add_bos_token in tokenizer_config.json",
    ),
    "also that nothing does": (
        byte_level,
        {CONFIG: named(bos_token="<|im_start|>", add_bos_token=True)},
        "no token begins every text, as tokenizer.json has it, not as add_bos_token in tokenizer_config.json",
    ),
    "without tokenizer.json, the config says it": (
        gpt2,
        {CONFIG: named(bos_token="<|im_start|>", add_bos_token=True)},
        "",
    ),
    "a token is special": (
        byte_level,
        {
            CONFIG: named(added_tokens_decoder={"1": {"content": "<|im_start|>", "special": True, **FLAGS}}),
            "tokenizer.json": lambda rules: (
                rules | {"added_tokens": [t | {"special": t["id"] != 1} for t in rules["added_tokens"]]}
            ),
        },
        "<|im_start|> has the flags {'special': True}, as tokenizer_config.json has them, not as tokenizer.json",
    ),
    "a token is special in tokenizer.json": (
        byte_level,
        {CONFIG: named(added_tokens_decoder={"1": {"content": "<|im_start|>", "special": False, **FLAGS}})},
        "",
    ),
    "flags that agree": (
        byte_level,
        {CONFIG: named(added_tokens_decoder={"1": {"content": "<|im_start|>", "special": True, **FLAGS}})},
        "",
    ),
    "the template of a file": (
        byte_level,
        {"chat_template.jinja": "{{ messages[0].content }}!"},
        "the chat template is that of chat_template.jinja, not the other one in tokenizer_config.json",
    ),
    "the same template twice": (
        byte_level,
        {CONFIG: named(chat_template="{{ messages[0].content }}"), "chat_template.jinja": "{{ messages[0].content }}"},
        "",
    ),
    "templates by name": (
        byte_level,
        {CONFIG: named(chat_template={"default": "{{ messages[0].content }}?", "tool_use": "x"})},
        "",
    ),
    "a space is put before texts": (
        gpt2,
        {CONFIG: {"add_prefix_space": True}},
        "",
    ),
    "a space, as GPT-2's config has it": (
        byte_level,
        {CONFIG: {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
        "add_prefix_space is True, as tokenizer_config.json has it, not as tokenizer.json",
    ),
    "no space, as GPT-2's config has none": (
        byte_level,
        {CONFIG: {"tokenizer_class": "GPT2TokenizerFast"}, "tokenizer.json": prefixed(True)},
        "add_prefix_space is False, as a GPT2TokenizerFast has it by default, not as tokenizer.json",
    ),
    "no space, as GPT-2's config says": (
        byte_level,
        {
            CONFIG: {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
            "tokenizer.json": prefixed(True),
        },
        "add_prefix_space is False, as tokenizer_config.json has it, not as tokenizer.json",
    ),
    "a space, as Qwen 2's config has it": (
        byte_level,
        {CONFIG: {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}, "tokenizer.json": qwen2(False)},
        "add_prefix_space is True, as tokenizer_config.json has it, not as tokenizer.json",
    ),
    "no space for a model of Qwen 2": (
        byte_level,
        {CONFIG: {}, "config.json": {"model_type": "qwen2"}, "tokenizer.json": qwen2(True)},
        "add_prefix_space is False, as a Qwen2Tokenizer has it by default, not as tokenizer.json",
    ),
    "a space for a model of GPT-2": (
        byte_level,
        {CONFIG: {"add_prefix_space": True}, "config.json": {"model_type": "gpt2"}},
        "add_prefix_space is True, as tokenizer_config.json has it, not as tokenizer.json",
    ),
    "other classes have what tokenizer.json has": (
        byte_level,
        {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer.json": prefixed(True)},
        "",
    ),
    "Qwen 2's rules for vocab.json": (gpt2, {CONFIG: {"tokenizer_class": "Qwen2Tokenizer"}}, ""),
    "added_tokens.json alone": (
        llama,
        {ADDED: {"<|im_end|>": 1000}, CONFIG: {"pad_token": "<|im_end|>", "add_bos_token": True}},
        "",
    ),
}


@pytest.mark.parametrize(("source", "changes", "told"), CASES.values(), ids=CASES)
def test_what_counts_is_what_counts_in_transformers(
    source: Callable[[], Path], changes: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(source, tmp_path / "published", changes)
    with caplog.at_level(logging.WARNING, "gpt_jax"):
        ours = load_tokenizer(folder)
    assert [record.getMessage() for record in caplog.records] == [told] * bool(told)
    assert isinstance(ours, HuggingFaceTokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.end_of_text == theirs.eos_token_id
    begin = [] if ours.begin_of_text is None else [ours.begin_of_text]
    for text in ("the world", "<|im_start|>x" if source is byte_level else "x", *random_texts()[:100]):
        if source is llama and text.startswith(" "):
            continue  # Whose space transformers loses.
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids
        assert begin + ids == theirs(text, split_special_tokens=True).input_ids
    if ours.chat_template is not None:
        messages = [{"role": "user", "content": "hi"}]
        chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == chat
    again = load_tokenizer(ours.save(tmp_path))
    assert len(caplog.records) == bool(told)  # What is saved agrees.
    assert again.fingerprint == ours.fingerprint
    assert (again.begin_of_text, again.encode(" the")) == (ours.begin_of_text, ours.encode(" the"))


@pytest.mark.parametrize("before", [None, False, True])
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
def test_a_space_before_texts_of_roberta_is_as_in_transformers(
    before: bool | None, in_file: bool, by_class: bool, tmp_path: Path
) -> None:
    parts = dict.fromkeys(("bos_token", "eos_token", "sep_token", "cls_token", "unk_token"), "<|endoftext|>")
    config = {
        **dict.fromkeys(("pad_token", "mask_token"), "<|im_end|>"),
        **parts,
        **({"tokenizer_class": "RobertaTokenizer"} if by_class else {}),
        **({} if before is None else {"add_prefix_space": before}),
    }
    changes = {CONFIG: config, "tokenizer.json": prefixed(in_file), "config.json": {"model_type": "roberta"}}
    folder = folder_of(byte_level, tmp_path, changes)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("the world") == theirs.encode("the world", add_special_tokens=False)
    assert (ours.encode("the") == ours.encode(" the")) == bool(before)


@pytest.mark.parametrize(
    ("changes", "told", "stop_ids"),
    [
        (
            {"generation_config.json": {"eos_token_id": 2}, "config.json": {"eos_token_id": 2}},
            ["eos_token is <|endoftext|> (0) in the tokenizer, [2] in the model; both end a text"],
            {0, 2},
        ),
        ({"generation_config.json": {"eos_token_id": [0, 2]}, "config.json": {"eos_token_id": 2}}, [], {0, 2}),
        (
            {"generation_config.json": {"eos_token_id": [0, 2]}, "config.json": {"eos_token_id": 1}},
            ["eos_token_id is [0, 2], as generation_config.json has it, not [1], as config.json has it"],
            {0, 2},
        ),
        (
            {"config.json": {"bos_token_id": 2}, CONFIG: {"bos_token": "<|im_start|>"}},
            ["bos_token is <|im_start|> (1) in the tokenizer, [2] in the model; the tokenizer's counts"],
            {0, 2},
        ),
        (
            {CONFIG: {"added_tokens_decoder": {"610": {"content": "<new>", "special": True}}}},
            ["<new> is no added token, as tokenizer.json has it, not 610, as tokenizer_config.json has it"],
            {0, 2},
        ),
    ],
    ids=["tokenizer and generation", "a part", "generation and config", "begin", "an id that is not there"],
)
def test_ids_of_the_model_and_of_the_tokenizer(
    changes: dict[str, Any], told: list[str], stop_ids: set[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer's token ends a text as well as the model's; transformers stops at the model's alone."""
    with caplog.at_level(logging.WARNING, "gpt_jax"):
        tokenizer = load_tokenizer(folder_of(byte_level, tmp_path, changes))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(told)
    assert all(message.startswith(start) for message, start in zip(messages, told, strict=True)), messages
    assert tokenizer.stop_ids == stop_ids
    assert tokenizer.vocab_size == 600


def test_added_tokens_that_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        ADDED: {"<|im_start|>": 1000, "<|other|>": 1001},
        CONFIG: {"added_tokens_decoder": {"1000": {"content": "<|im_start|>"}, "1001": {"content": "<|im_end|>"}}},
    }
    with caplog.at_level(logging.WARNING, "gpt_jax"):
        tokenizer = load_tokenizer(folder_of(llama, tmp_path, changes))
    assert tokenizer.decode([1000, 1001]) == "<|im_start|><|im_end|>"
    assert caplog.messages == [
        "<|other|> is no token of id 1001, as added_tokens.json has it: tokenizer_config.json differs"
    ]


def test_more_special_tokens_of_a_vocabulary_are_special(tmp_path: Path) -> None:
    """As those of a chat model in vocab.json, which says of no token that it is special."""
    names = ["<|im_start|>", {"content": "<|im_end|>"}, "the"]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokenizer = load_tokenizer(folder_of(gpt2, tmp_path / key, {CONFIG: {key: names}}))
        assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
        assert load_tokenizer(tokenizer.save(tmp_path)).special_tokens == tokenizer.special_tokens
