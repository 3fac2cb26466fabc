"""The bytes of UTF-8 as a vocabulary: lossless, and without training."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.tokenizer.tokenizer import (
    END_OF_TEXT,
    JSON_FILE,
    SPECIAL_TOKENS,
    ByteDecoder,
    Lossless,
    save_bytes,
    utf8,
)


class ByteTokenizer(Lossless):
    """The bytes of UTF-8 as ids 0 to 255, then the special tokens."""

    def __init__(self) -> None:
        self.special_tokens = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.token_bytes = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL_TOKENS]
        definition = {"type": "bytes", "special_tokens": self.special_tokens}
        self._definition = (json.dumps(definition, indent=2) + "\n").encode()
        self.fingerprint = hashlib.sha256(self._definition).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def cut(self, text: str) -> int:
        """See Tokenizer."""
        return len(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def decoder(self, after: Sequence[int] = ()) -> ByteDecoder:
        """See Tokenizer."""
        return ByteDecoder(self.token_bytes)

    def save(self, folder: Path) -> Path:
        """See Tokenizer."""
        self.save_template(folder)
        return save_bytes(folder / JSON_FILE, self._definition)

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> "ByteTokenizer":
        """The tokenizer that `save` wrote. Raises ValueError if it has other special tokens."""
        tokenizer = cls()
        if definition != json.loads(tokenizer._definition):
            raise ValueError("its special tokens are not those of this version")
        return tokenizer
