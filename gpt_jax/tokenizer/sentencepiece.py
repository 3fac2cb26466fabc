"""Lossless SentencePiece models: decoding gives back every space, newline and character."""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from gpt_jax.tokenizer.tokenizer import END_OF_TEXT, SENTENCEPIECE_FILE, ByteDecoder, Lossless, save_bytes, utf8

# The units that are tokenised independently: spaces, then characters up to the next space or newline, then newlines. No
# token of the models trained here crosses from one unit to the next, so the result is that of the whole text.
WORD = re.compile(r" *[^ \n]*\n*")
_BEFORE_LAST_WORD = re.compile(r"(?s:.*)(?:(?<=[^ ])(?= )|(?<=\n)(?=[^\n]))")
logger = logging.getLogger(__name__)


class ForeignModelError(ValueError):
    """A valid SentencePiece model, but not of the kind that `train_sentencepiece` makes."""


class SentencePieceTokenizer(Lossless):
    """A lossless SentencePiece model, such as `train_sentencepiece` makes.

    A model without byte fallback (model type char) lacks characters: unknown ones are encoded as the id of <unk>, with
    a warning the first time, and decoded as U+FFFD.
    """

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when `model` is damaged, ForeignModelError when it changes text or lacks <|endoftext|>."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            processor = None
        if processor is None or not model:  # No bytes give a processor without a model.
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
        self.token_bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        plain = (p.replace("▁", " ") for i, p in enumerate(pieces) if not processor.is_control(i))
        if not all(WORD.fullmatch(piece) for piece in plain):
            raise ForeignModelError("it has tokens that go on after a newline, or after a space within")
        self._unknown = int(processor.unk_id())
        # U+2581 stands for a space in SentencePiece, so U+2581 itself must be spelled in bytes.
        self._lower_block = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._warned = False
        self._words = WordCache(self._encode_word)

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

    def cut(self, text: str) -> int:
        """See Tokenizer."""
        found = _BEFORE_LAST_WORD.match(text)
        return found.end() if found else 0

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self, after: Sequence[int] = ()) -> ByteDecoder:
        """See Tokenizer."""
        return ByteDecoder(self.token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        self.save_template(folder)
        return save_bytes(folder / SENTENCEPIECE_FILE, self.model)


class WordCache(dict[str, bytes]):
    """Token ids by word. Text repeats its words, and a look-up takes a fifth of the time of BPE."""

    MAX_WORDS = 1 << 18  # About 50 MB.
    MAX_LENGTH = 32  # Characters. Longer words, such as a line of Chinese, rarely repeat.

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
