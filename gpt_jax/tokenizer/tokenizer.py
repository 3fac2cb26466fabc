"""Text to token ids and back, behind one small interface; here SentencePiece models and plain bytes, without loss."""

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

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
BYTE_LEVEL_FILE = "vocab.json"  # GPT-2's, with merges.txt beside it.
WORDPIECE_FILE = "vocab.txt"  # BERT's.
# The files that a tokenizer is known by; of several in a folder, the first one counts.
FILES = (JSON_FILE, SENTENCEPIECE_FILE, BYTE_LEVEL_FILE, WORDPIECE_FILE)

# The units that are tokenised independently: spaces, what follows up to the next space or newline, and newlines. No
# token of the models trained here crosses from one to the next, so the result is that of the whole text.
WORD = re.compile(r" *[^ \n]*\n*")

NO_CHAT = "the tokenizer has no chat template, which says how to write a conversation; take a model made for chat"

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
    def begin_of_text(self) -> int | None:
        """Id of the token that starts every document, such as Llama's <s>; None where there is none."""

    @property
    def end_of_text(self) -> int:
        """Id of <|endoftext|>, or what another vocabulary calls it, which follows every document."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text which a model generates: `end_of_text`, and those that end a turn of a chat."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that writes a conversation as text, as it was published; None where there is none."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the encoding, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never a special one, and none added at its start or end.

        Raises UserError for half of a surrogate pair, which is no text.
        """

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, in an int32 array: faster where there is much text."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the next answer begins.

        Each message has a "role" (system, user or assistant) and a "content", in which names of special tokens are
        plain text. Raises UserError when there is no chat template, or when the template refuses the conversation.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens appear by name; bytes that are no UTF-8 text become U+FFFD."""

    def decoder(self, after: Sequence[int] = ()) -> "IncrementalDecoder":
        """A decoder that takes one id at a time, for streaming.

        after: ids of the text that comes before, which may decide whether a space stands between.
        """

    def save(self, folder: Path) -> Path:
        """Writes the file that defines the tokenizer into `folder`, whole or not at all. Returns its path."""


class IncrementalDecoder(Protocol):
    """Decodes one token at a time.

    What it returns concatenates to `decode` of all ids; where there is text before, to what they add to it.
    """

    def push(self, token: int) -> str:
        """The text that `token` completes: nothing while a character still lacks bytes."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never came to its end."""


class ByteDecoder:
    """The incremental decoder of tokens that stand for bytes."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """See IncrementalDecoder."""
        return self._utf8.decode(self._token_bytes[token])

    def flush(self) -> str:
        """See IncrementalDecoder."""
        return self._utf8.decode(b"", final=True)


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises UserError for half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"character {e.start} of the text is half of a surrogate pair: {text[e.start]!r}") from None


def save_bytes(path: Path, content: bytes) -> Path:
    """Writes a file, whole or not at all, and returns its path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


class _WithoutChat:
    """What the tokenizers made here have in common: nothing starts a document, and there is no chat template."""

    end_of_text: int
    begin_of_text: int | None = None
    chat_template: str | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        """See Tokenizer."""
        return frozenset({self.end_of_text})

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises UserError."""
        raise UserError(NO_CHAT)


class ByteTokenizer(_WithoutChat):
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
        return list(utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self._token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self, after: Sequence[int] = ()) -> ByteDecoder:
        """See Tokenizer."""
        return ByteDecoder(self._token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        return save_bytes(folder / JSON_FILE, self._definition)

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> "ByteTokenizer":
        """The tokenizer that `save` wrote. Raises ValueError if it has other special tokens."""
        tokenizer = cls()
        if definition != json.loads(tokenizer._definition):
            raise ValueError("its special tokens are not those of this version")
        return tokenizer


class ForeignModelError(ValueError):
    """A SentencePiece model that is sound, but not of the kind that `train_sentencepiece` makes."""


class SentencePieceTokenizer(_WithoutChat):
    """A SentencePiece model that keeps text as it is, such as `train_sentencepiece` makes.

    A model without byte fallback (model type char) does not know every character: unknown ones are encoded as the id of
    <unk>, with a warning the first time, and decoded as U+FFFD.
    """

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when `model` is damaged, ForeignModelError when it changes text or lacks <|endoftext|>."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            processor = None
        if processor is None or not model:  # No bytes at all make a processor without a model.
            raise ValueError("it is not a SentencePiece model, or damaged")
        self._processor = processor
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(processor.vocab_size())
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.special_tokens = {piece: i for i, piece in enumerate(pieces) if processor.is_control(i)}
        if END_OF_TEXT not in self.special_tokens:
            raise ForeignModelError(f"its vocabulary has no control symbol {END_OF_TEXT}")
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        if processor.normalize(" ﬁ  x ") != "▁ﬁ▁▁x▁":
            raise ForeignModelError("it changes the text (normalization rule, dummy prefix or extra whitespace)")
        self._token_bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        plain = (p.replace("▁", " ") for i, p in enumerate(pieces) if not processor.is_control(i))
        if not all(WORD.fullmatch(piece) for piece in plain):
            raise ForeignModelError("it has tokens that go on after a newline, or after a space within")
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
        utf8(text)
        return np.frombuffer(b"".join(map(self._words.__getitem__, WORD.findall(text))), np.int32)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self._token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self, after: Sequence[int] = ()) -> ByteDecoder:
        """See Tokenizer."""
        return ByteDecoder(self._token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        return save_bytes(folder / SENTENCEPIECE_FILE, self.model)


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


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one of FILES, made here or published elsewhere.

    What is beside the file is read too where it belongs to it, such as `merges.txt` and `tokenizer_config.json`.
    Raises UserError when there is none, when it is damaged or of a kind that is not known, and when it needs a package
    that is not installed.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"there is no tokenizer in {path}: none of {', '.join(FILES)}")
        path = found[0]
    try:
        return _load(path, path.read_bytes())
    except FileNotFoundError as e:
        missing = f", which belongs to {path.name}" if e.filename != str(path) else ""
        raise UserError(f"there is no tokenizer {e.filename}{missing}") from None
    except OSError as e:
        raise UserError(f"{e.filename or path} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path} cannot be used as a tokenizer: {e}") from e
    except (TypeError, LookupError, AttributeError, RecursionError) as e:  # Something of another type somewhere.
        raise UserError(
            f"{path} cannot be used as a tokenizer: something in it, or in a file beside it, is of another type than "
            f"it should be ({type(e).__name__}: {e})"
        ) from e


def _load(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer that the content of a file defines. Raises ValueError where it is damaged or not known."""
    if path.name in (BYTE_LEVEL_FILE, WORDPIECE_FILE):
        from gpt_jax.interop import tokenizer_files

        return tokenizer_files.from_vocabulary(path)
    if path.suffix == ".json":
        return _from_json(path, content)
    try:
        return SentencePieceTokenizer(content)
    except ForeignModelError:
        from gpt_jax.interop import tokenizer_files

        return tokenizer_files.from_sentencepiece(path)


def _from_json(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer that a JSON object defines: ours by its "type", Hugging Face's by its "model"."""
    definition = json.loads(content)
    keys = definition if isinstance(definition, dict) else {}
    if keys.get("type") == "bytes":
        return ByteTokenizer.from_definition(keys)
    if "model" in keys:
        from gpt_jax.data.hf_tokenizer import HuggingFaceTokenizer, read_settings

        return HuggingFaceTokenizer(content, read_settings(path.parent))
    raise ValueError('it is neither a JSON object of "type": "bytes" nor one with a "model", as Hugging Face has')
