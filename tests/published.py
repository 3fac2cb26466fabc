"""Small tokenizers as they are published, each in a folder of its own, and texts to try them on."""

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece

from gpt_jax.data.corpora import python_docs

CHINESE = "人工智能是研究、开发用于模拟人的智能的理论和技术。\n语言模型预测下一个词。\n"
TEXT = "".join(python_docs()[:40]) + CHINESE * 20

EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False}  # As transformers writes it.

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# fmt: off
ATOMS = [
    "hello", "world", "The", "don't", "'S", "n't", "2024", "3.14", "straße", "Straße", "İ", "ǅ", "Привет", "שלום",
    "สวัสดี", "한국어", "ñandú", "a\u0300\u0301", "e\u0301", "é", "ﬁ", "①", "你好", "语言模型", "人工智能。",
    "🙂", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "=====", "((", "{}", "C:\\x", "http://a.b/c?d=e", "don\u2019t", "▅",
    "##x", "\u017f", "\uff26\uff35\uff2c",
]
# fmt: on
ATOMS += [" ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "\0", "\x07", "\x1f", "\u200b", "\u200d", "\ufeff", "\u2028"]
ATOMS += ["\u3000", "\xa0", "\ufffd", "\U0010ffff"]
RANGES = [(0x20, 0x7F), (0x4E00, 0x9FFF), (0, 0x250), (0x1F300, 0x1F700), (0x300, 0x370)]


@functools.cache
def random_texts() -> list[str]:
    """2,000 texts: of words and signs that go wrong easily, of any characters, and of those of a few scripts."""
    rng = random.Random(0)

    def text(kind: int) -> str:
        n = rng.randrange(1, 20)
        if kind < 2:
            return ["", " "][kind].join(rng.choices(ATOMS, k=n))
        if kind == 2:
            return "".join(chr(c) for c in rng.choices(range(0x110000), k=n) if not 0xD800 <= c < 0xE000)
        return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(n))

    return [text(i % 4) for i in range(2000)]


@functools.cache
def byte_level() -> Path:
    """Byte-level BPE as a tokenizer.json, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder = _folder({"eos_token": "<|endoftext|>", "chat_template": TEMPLATE})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@functools.cache
def gpt2() -> Path:
    """The same as vocab.json and merges.txt, as GPT-2 was published."""
    model = json.loads((byte_level() / "tokenizer.json").read_bytes())["model"]
    folder = _folder({"tokenizer_class": "GPT2Tokenizer"})
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder


@functools.cache
def llama(model_type: str = "bpe") -> Path:
    """A SentencePiece model with Llama's settings."""
    folder = _folder({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": EOS})
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()),
            model_writer=file,
            model_type=model_type,
            vocab_size=1000,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=2,
            minloglevel=2,
        )
    return folder


@functools.cache
def bert() -> Path:
    """The vocabulary of a Chinese BERT, as Chinese GPT-2 models have it."""
    words = [
        "the",
        "of",
        "model",
        "##s",
        "##ing",
        "don",
        "hello",
        "world",
        "20",
        "##24",
        "e",
        "##x",
        "strasse",
        "'",
        "t",
    ]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    characters = [*".,!?。、()=:/{", *letters, *sorted({c for c in CHINESE if c >= "一"})]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *[f"##{c}" for c in letters]]
    folder = _folder({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n", encoding="utf-8")
    return folder


def _folder(config: dict[str, Any]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gpt_jax-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


PUBLISHED = {"byte_level": byte_level, "gpt2": gpt2, "llama": llama, "bert": bert}
