"""Training lossless SentencePiece models: decoding gives back every space, newline and character."""

import io
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sentencepiece

from gpt_jax.config import TokenizerType
from gpt_jax.data.formats import cut_before_space
from gpt_jax.data.order import mix
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.sentencepiece import WORD
from gpt_jax.tokenizer.tokenizer import SPECIAL_TOKENS

SAMPLE_BYTES = 8 << 20  # Most text that a tokenizer is trained on, which takes up to 70 times its size in memory.
_SENTENCE_BYTES = 4096
_BORDER = "\x1f"  # Stands between words in the training text: no token may contain it.


class TextSample:
    """Parts of the texts of many sources, spread evenly over them, of at most `max_bytes` for any length of the text.

    All parts are taken while they fit, then every second one, every fourth... The choice depends on the texts and their
    sources alone: the samples of parts of a corpus, merged, are the sample of the whole.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stride = 1
        self._next = 0
        self._numbers = array("Q")  # Of the parts that were taken.
        self._parts: list[bytes] = []
        self._n_bytes = 0

    def begin(self, source: int) -> None:
        """The texts that follow are of the source with this number."""
        # By a hash, so that of many short sources some are taken, and not every second one of two kinds that alternate.
        self._next = int(mix(np.array([source], np.uint64))[0] >> np.uint64(1))

    def add(self, text: bytes) -> None:
        """Takes the next part of the text (valid UTF-8), in pieces of about 4 KiB."""
        start = 0
        while start < len(text):
            end = start + cut_before_space(text[start : start + _SENTENCE_BYTES + 1], _SENTENCE_BYTES)
            if self._next % self._stride == 0:
                self._take(self._next, text[start:end])
            self._next += 1
            start = end

    def _take(self, number: int, part: bytes) -> None:
        self._numbers.append(number)
        self._parts.append(part)
        self._n_bytes += len(part)
        while self._n_bytes > self._max_bytes and len(self._parts) > 1:
            self._thin_out(2 * self._stride)

    def _thin_out(self, stride: int) -> None:
        taken = [i for i, number in enumerate(self._numbers) if number % stride == 0]
        self._numbers = array("Q", (self._numbers[i] for i in taken))
        self._parts = [self._parts[i] for i in taken]
        self._stride = stride
        self._n_bytes = sum(map(len, self._parts))

    def packed(self) -> tuple[dict[str, Any], bytes]:
        """The sample as what JSON can hold, and bytes, for `merge`."""
        sizes = [len(part) for part in self._parts]
        header = {"stride": self._stride, "numbers": self._numbers.tolist(), "sizes": sizes}
        return header, b"".join(self._parts)

    def merge(self, header: dict[str, Any], content: bytes) -> None:
        """Adds the sample of sources that come after those in this one."""
        if header["stride"] > self._stride:
            self._thin_out(header["stride"])
        end = 0
        for number, size in zip(header["numbers"], header["sizes"], strict=True):
            start, end = end, end + size
            if number % self._stride == 0:
                self._take(number, content[start:end])

    def __iter__(self) -> Iterator[str]:
        return (part.decode() for part in self._parts)

    @property
    def n_bytes(self) -> int:
        """Bytes of text in the sample."""
        return self._n_bytes


def train_sentencepiece(texts: Iterable[str], model_type: TokenizerType, vocab_size: int) -> bytes:
    """A SentencePiece model trained on `texts` (each a few KiB), as the content of its file.

    `vocab_size` counts the special tokens, and for bpe and unigram the 256 bytes that spell rare characters. For char
    it is a maximum: the vocabulary is the characters of the text. The same texts give the same model.
    Raises UserError naming the bound when the texts do not yield that many tokens, or have more characters.
    """
    model = io.BytesIO()
    # A list, not a generator: SentencePiece reports whatever a generator raises, Ctrl-C included, as its own failure.
    # While it reads a list, no Python code runs, and a signal is handled as soon as it returns.
    sentences = list(texts)
    options: dict[str, Any]
    if model_type == "char":
        # Training drops the newlines that end a sentence, and all tabs.
        present = {c for c in "\n\r\t" if any(c in text for text in sentences)}
        options = {
            "character_coverage": 1.0,
            "hard_vocab_limit": False,
            "required_chars": "".join(sorted(present - {"\t"})),
            "user_defined_symbols": sorted(present & {"\t"}),
        }
    else:
        sentences = [re.sub(WORD, _with_border, text.replace(_BORDER, "")) for text in sentences]
        options = {
            "character_coverage": 0.9995,  # The rarest characters are spelled in bytes.
            "byte_fallback": True,
            "allow_whitespace_only_pieces": True,  # Indentation is one token.
            "split_digits": True,
            "pretokenization_delimiter": _BORDER,
        }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            control_symbols=list(SPECIAL_TOKENS),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,  # Longer sentences would be left out.
            num_threads=16,  # The last digit of sums depends on it, so it must not vary with the machine.
            minloglevel=2,
            **options,
        )
    except RuntimeError as e:
        raise UserError(_explain(str(e), model_type, vocab_size)) from None
    return model.getvalue()


def _with_border(word: re.Match[str]) -> str:
    return word.group() + _BORDER if word.group() else ""


def _explain(message: str, model_type: str, vocab_size: int) -> str:
    """SentencePiece's error in one line that names the bound."""
    setting = f"a {model_type} vocabulary of {vocab_size} is not possible"
    if bound := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{setting} for this text: it needs {bound[1]} or more, one for each character it holds"
    if bound := re.search(r"too high .* <= (\d+)", message):
        return f"{setting} for this text: it is too short to yield more than {bound[1]}; ask for that, or add text"
    if "sentences_.empty()" in message:
        return f"{setting}: there is no text to train it on"
    return f"{setting}: SentencePiece says {message.splitlines()[0]}"
