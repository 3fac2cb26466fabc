"""Published tokenizers give what transformers gives, on 2,000 random texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from gpt_jax.tokenizer.export import export_tokenizer  # noqa: E402
from gpt_jax.tokenizer.load import load_tokenizer  # noqa: E402
from gpt_jax.tokenizer.published import gguf_tokenizer  # noqa: E402
from gpt_jax.tokenizer.tokenizer import Tokenizer  # noqa: E402
from tests.published import CHINESE, PUBLISHED, TEMPLATE, TEXT, llama, random_texts  # noqa: E402
from tests.tokenizer.test_published import llama_fields  # noqa: E402
from tests.tokenizer.test_tokenizer import EVERY  # noqa: E402

pytestmark = pytest.mark.parity

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2024 + 1? 你好 🙂"},
    {"role": "assistant", "content": "2025\n"},
    {"role": "user", "content": "Thanks!"},
]


def assert_equal(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    """Both encode all texts to the same ids, and decode these to the same texts.

    But for texts that begin with a space, which transformers' Llama loses; see test_llama_cpp for these.
    """
    loses_a_space = theirs.encode("a", add_special_tokens=False) == theirs.encode(" a", add_special_tokens=False)
    loses_a_space = loses_a_space and ours.encode("a") != ours.encode(" a")
    for text in texts:
        ids = ours.encode(text)
        if not (loses_a_space and text.startswith((" ", "▁"))):
            assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.encode_array(text).tolist() == ids
        expected = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected, repr(text)


@pytest.mark.parametrize("folder", PUBLISHED.values(), ids=PUBLISHED)
def test_it_encodes_and_decodes_as_transformers(folder: Callable[[], Path]) -> None:
    ours, theirs = load_tokenizer(folder()), transformers.AutoTokenizer.from_pretrained(folder())
    assert_equal(ours, theirs, [*random_texts(), TEXT[:100_000]])
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("folder", PUBLISHED.values(), ids=PUBLISHED)
def test_what_is_exported_again_is_the_same_in_transformers(folder: Callable[[], Path], tmp_path: Path) -> None:
    ours = load_tokenizer(folder())
    export_tokenizer(ours, tmp_path, context_length=512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_equal(ours, theirs, random_texts())
    assert theirs.model_max_length == 512
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.chat_template == ours.chat_template
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_tokens_that_are_ordinary_text_are_exported_as_such(tmp_path: Path) -> None:
    """A special "!" would cut texts in transformers."""
    shutil.copytree(PUBLISHED["gpt2"](), tmp_path / "published")
    (tmp_path / "published" / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
    ours = load_tokenizer(tmp_path / "published")
    (tmp_path / "exported").mkdir()
    export_tokenizer(ours, tmp_path / "exported", context_length=512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert_equal(ours, theirs, ["Is 1 != 2?", "Yes! No!!", *random_texts()[:100]])
    assert (theirs.pad_token, theirs.eos_token) == (None, "<|endoftext|>")


@pytest.mark.parametrize("name", EVERY)
def test_tokenizers_made_here_are_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    ours = EVERY[name]
    export_tokenizer(ours, tmp_path, context_length=512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    more = [CHINESE, "<0x41>\n  \n x"]
    if name != "char":  # In which U+2581 is unknown, and the library makes one token of unknown neighbours.
        more += ["a▁b▁▁ c", "▁"]
    if name != "unigram":  # In which a long run of one sign is cut in several ways that are equally probable.
        more += [TEXT]
    assert_equal(ours, theirs, [*random_texts(), *more])
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.end_of_text


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_in_transformers_as_it_was_published(adds: bool, tmp_path: Path) -> None:
    """From a folder and from a GGUF file. Ours never adds the token to what it encodes."""
    original = tmp_path / "original"
    shutil.copytree(llama(), original)
    settings = json.loads((original / "tokenizer_config.json").read_text())
    (original / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": adds}))
    theirs = transformers.AutoTokenizer.from_pretrained(original)
    gguf = gguf_tokenizer(llama_fields(add_bos_token=adds))
    for name, ours in (("folder", load_tokenizer(original)), ("gguf", gguf)):
        exported = tmp_path / name
        exported.mkdir()
        export_tokenizer(ours, exported, context_length=512)
        again = transformers.AutoTokenizer.from_pretrained(exported)
        assert ours.begin_of_text == (1 if adds else None)
        for text in ("the world", "", "你好"):
            assert again(text).input_ids == theirs(text).input_ids == [1] * adds + ours.encode(text)
        assert again("the", "world").input_ids == theirs("the", "world").input_ids


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("byte_level", TEMPLATE),
        (
            "llama",
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}",
        ),
        ("bert", "{% for m in messages %}{{ m.content | tojson }}{{ sep_token }}\n{% endfor %}"),
    ],
    ids=["byte_level", "llama", "bert"],
)
def test_a_chat_is_written_as_transformers_writes_it(name: str, template: str, tmp_path: Path) -> None:
    shutil.copytree(PUBLISHED[name](), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert load_tokenizer(tmp_path).encode_chat(MESSAGES) == expected


@pytest.mark.slow
def test_the_tokenizer_of_smollm2(smollm2_gguf: Path) -> None:
    """transformers does not know that SmolLM2 cuts text at every digit, so texts with digits are left out."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(smollm2_gguf)
    ours = gguf_tokenizer({key: field.contents() for key, field in reader.fields.items()})
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    texts = [text for text in random_texts() if not any(c.isnumeric() for c in text)]
    assert len(texts) > 1200
    assert_equal(ours, theirs, texts)
    assert ours.decode(ours.encode(" 2024")).split() == ["2024"]
    assert len(ours.encode("2024")) == 4
    assert (ours.vocab_size, ours.begin_of_text, ours.end_of_text) == (49152, None, 2)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[3:]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == expected
