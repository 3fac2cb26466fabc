"""A process that tokenises: text comes in on stdin, token ids go out on stdout.

Each message is its length (8 bytes, little endian) and then its bytes. Text is UTF-8 in which a byte 0xFF, which no
UTF-8 contains, ends a document; the answer is the token ids in the type in which they are stored.
"""

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt_jax.data.shards import token_dtype
from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer

END_OF_DOCUMENT = b"\xff"


def send(pipe: BinaryIO, message: bytes) -> None:
    """Writes one message. Raises BrokenPipeError when the other end is gone."""
    pipe.write(len(message).to_bytes(8, "little"))
    pipe.write(message)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes:
    """Reads one message. Raises EOFError when the other end is gone."""
    header = pipe.read(8)
    n_bytes = int.from_bytes(header, "little")
    message = pipe.read(n_bytes)
    if len(header) < 8 or len(message) < n_bytes:
        raise EOFError
    return message


def encode_documents(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
    """Token ids of `text`, in which END_OF_DOCUMENT stands for <|endoftext|>, in the type in which they are stored."""
    end = np.array([tokenizer.end_of_text], np.int32)
    first, *others = (tokenizer.encode_array(part.decode()) for part in text.split(END_OF_DOCUMENT))
    parts = [first]
    for part in others:
        parts += [end, part]
    return np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size))


def main() -> None:
    """Answers until stdin is closed, which also happens when the parent dies."""
    tokenizer = load_tokenizer(Path(sys.argv[1]))
    try:
        while True:
            text = receive(sys.stdin.buffer)
            send(sys.stdout.buffer, encode_documents(tokenizer, text).tobytes())
    except (EOFError, BrokenPipeError):
        sys.stdout = None  # Nothing is left to flush it to.


if __name__ == "__main__":
    main()
