"""Text to token ids and back, without loss: SentencePiece models and plain bytes behind one small interface."""

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from gpt_jax.errors import UserError
from gpt_jax.files import replacing

END_OF_TEXT = "<|endoftext|>"
# The end of a document, and the roles of a chat. Text never yields their ids, whatever it looks like.
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"

# The units that are tokenised independently: spaces, what follows up to the next space or newline, and newlines. No
# token of the models trained here crosses from one to the next, so the result is that of the whole text.
WORD = re.compile(r" *[^ \n]*\n*")

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Text to token ids and back. decode(encode(text)) == text for any text, unless the class says otherwise."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by name."""

    @property
    def end_of_text(self) -> int:
        """Id of <|endoftext|>, which follows every document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file that defines the tokenizer, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never a special one. Raises UserError for half of a surrogate pair, which is no text."""

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, in an int32 array: faster where there is much text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens appear by name; bytes that are no UTF-8 text become U+FFFD."""

    def decoder(self) -> "IncrementalDecoder":
        """A decoder that takes one id at a time, for streaming."""

    def save(self, folder: Path) -> Path:
        """Writes the file that defines the tokenizer into `folder`, whole or not at all. Returns its path."""


class IncrementalDecoder:
    """Decodes one token at a time. What it returns concatenates to `decode` of all ids."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: nothing while a character still lacks bytes."""
        return self._utf8.decode(self._token_bytes[token])

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never came to its end."""
        return self._utf8.decode(b"", final=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"character {e.start} of the text is half of a surrogate pair: {text[e.start]!r}") from None


def _save(path: Path, content: bytes) -> Path:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, then the special tokens."""

    def __init__(self) -> None:
        self.special_tokens = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self._token_bytes = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL_TOKENS]
        definition = {"type": "bytes", "special_tokens": self.special_tokens}
        self._definition = (json.dumps(definition, indent=2) + "\n").encode()
        self.fingerprint = hashlib.sha256(self._definition).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(_utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self._token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self) -> IncrementalDecoder:
        """See Tokenizer."""
        return IncrementalDecoder(self._token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        return _save(folder / JSON_FILE, self._definition)

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> "ByteTokenizer":
        """The tokenizer that `save` wrote. Raises ValueError if it has other special tokens."""
        tokenizer = cls()
        if definition != json.loads(tokenizer._definition):
            raise ValueError("its special tokens are not those of this version")
        return tokenizer


class SentencePieceTokenizer:
    """A SentencePiece model that keeps text as it is, such as `train_sentencepiece` makes.

    A model without byte fallback (model type char) does not know every character: unknown ones are encoded as the id of
    <unk>, with a warning the first time, and decoded as U+FFFD.
    """

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when `model` is damaged, changes the text that it encodes, or lacks <|endoftext|>."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            processor = None
        if processor is None or not model:  # No bytes at all make a processor without a model.
            raise ValueError("it is not a SentencePiece model, or damaged")
        self._processor = processor
        self._model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(processor.vocab_size())
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.special_tokens = {piece: i for i, piece in enumerate(pieces) if processor.is_control(i)}
        if END_OF_TEXT not in self.special_tokens:
            raise ValueError(f"its vocabulary has no control symbol {END_OF_TEXT}")
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        if processor.normalize(" ﬁ  x ") != "▁ﬁ▁▁x▁":
            raise ValueError("it changes the text (normalization rule, dummy prefix or extra whitespace)")
        self._token_bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        plain = (p.replace("▁", " ") for i, p in enumerate(pieces) if not processor.is_control(i))
        if not all(WORD.fullmatch(piece) for piece in plain):
            raise ValueError("it has tokens that go on after a newline, or after a space within")
        self._unknown = int(processor.unk_id())
        # U+2581 stands for a space in SentencePiece, so that a real one must be spelled in bytes.
        self._lower_block = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._warned = False
        self._words = _WordCache(self._encode_word)

    def _bytes_of(self, i: int, piece: str) -> bytes:
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x41>
        if self._processor.is_unknown(i):
            return "\ufffd".encode()
        if self._processor.is_control(i):
            return piece.encode()
        return piece.replace("▁", " ").encode()

    def _encode_word(self, word: str) -> bytes:
        """Token ids of one match of WORD, as the bytes of an int32 array."""
        first, *others = word.split("▁")
        ids = self._processor.encode(first)
        for part in others:
            ids += self._lower_block + self._processor.encode(part)
        if self._unknown in ids and not self._warned:
            self._warned = True
            character = next((c for c in word if self._unknown in self._processor.encode(c)), "▁")
            logger.warning("the vocabulary has no character %r: such characters are encoded as <unk>", character)
        return np.array(ids, np.int32).tobytes()

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        _utf8(text)
        return np.frombuffer(b"".join(map(self._words.__getitem__, WORD.findall(text))), np.int32)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self._token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self) -> IncrementalDecoder:
        """See Tokenizer."""
        return IncrementalDecoder(self._token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        return _save(folder / SENTENCEPIECE_FILE, self._model)


class _WordCache(dict[str, bytes]):
    """Words to their token ids. Text repeats its words, and a look-up takes a fifth of the time of BPE."""

    MAX_WORDS = 1 << 18  # About 50 MB.
    MAX_LENGTH = 32  # Longer ones, such as a line of Chinese, hardly ever come again.

    def __init__(self, encode_word: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> bytes:
        ids = self._encode_word(word)
        if len(word) <= self.MAX_LENGTH:
            if len(self) >= self.MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _from_json(content: bytes) -> Tokenizer:
    """The tokenizer that a JSON object defines, by its "type". Raises ValueError where that is not known."""
    definition = json.loads(content)
    kind = definition.get("type") if isinstance(definition, dict) else None
    if kind != "bytes":
        raise ValueError(f'it is not a JSON object of "type": "bytes"{f", but of {kind!r}" if kind else ""}')
    return ByteTokenizer.from_definition(definition)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds a `tokenizer.model` or a `tokenizer.json`.

    Raises UserError when there is none, or when it is damaged or of a kind that is not known.
    """
    if path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, JSON_FILE) if (path / name).is_file()]
        if not found:
            raise UserError(f"there is no tokenizer in {path}: neither {SENTENCEPIECE_FILE} nor {JSON_FILE}")
        path = found[0]
    try:
        content = path.read_bytes()
        return _from_json(content) if path.suffix == ".json" else SentencePieceTokenizer(content)
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer {path}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path} cannot be used as a tokenizer: {e}") from e
