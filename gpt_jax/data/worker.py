"""A process that tokenises what it reads from stdin, and writes token ids to stdout.

Each message is its length (8 bytes, little endian) followed by its bytes. In texts, which are UTF-8, a byte 0xFE starts
a document and a byte 0xFF ends it, since UTF-8 contains neither. Conversations, preferences and problems are JSON
Lines. Token ids have the dtype in which they are stored.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt_jax.data import conversations, preferences, problems
from gpt_jax.data.clean import Cleaner, clean_config, judged
from gpt_jax.data.encoded import Encoder, encode_records
from gpt_jax.data.shards import token_dtype
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer, encode_on

START_OF_DOCUMENT = b"\xfe"
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
    """Token ids of `text`, in the dtype in which they are stored.

    A text that does not begin with START_OF_DOCUMENT goes on with a document that was cut at `tokenizer.cut`.

    START_OF_DOCUMENT becomes `begin_of_text`, if there is one, and END_OF_DOCUMENT `end_of_text`. If both are the
    same token, it is written only at the end of a document.
    """
    begin, end = tokenizer.begin_of_text, tokenizer.end_of_text
    marks = {START_OF_DOCUMENT: [] if begin in (None, end) else [begin], END_OF_DOCUMENT: [end]}
    rest, *parts = re.split(b"([\xfe\xff])", text)
    ids = [encode_on(tokenizer, rest.decode()) if rest else np.array([], np.int32)]
    ids += [
        np.array(marks[part], np.int32) if part in marks else tokenizer.encode_array(part.decode()) for part in parts
    ]
    return np.concatenate(ids).astype(token_dtype(tokenizer.vocab_size))


Job = Callable[[bytes], bytes]


def _text(tokenizer_file: str) -> Job:
    tokenizer = load_tokenizer(Path(tokenizer_file))
    return lambda text: encode_documents(tokenizer, text).tobytes()


def _records(encoder: Encoder) -> Callable[[str], Job]:
    def job(tokenizer_file: str) -> Job:
        tokenizer = load_tokenizer(Path(tokenizer_file))
        return lambda lines: encode_records(tokenizer, lines, encoder)

    return job


def _clean(config: str) -> Job:
    cleaner = Cleaner(clean_config(json.loads(config)))
    return lambda texts: judged(cleaner, texts)


JOBS: dict[str, Callable[[str], Job]] = {
    "text": _text,
    "clean": _clean,
    "chat": _records(conversations.documents),
    "completion": _records(conversations.documents),
    "preference": _records(preferences.documents),
    "problem": _records(problems.documents),
}
"""What is done with each message, made of an argument: the file of a tokenizer, or settings as JSON."""


def main() -> None:
    """Answers until stdin is closed, which also happens when the parent dies."""
    job = JOBS[sys.argv[1]](sys.argv[2])
    try:
        while True:
            send(sys.stdout.buffer, job(receive(sys.stdin.buffer)))
    except (EOFError, BrokenPipeError):
        sys.stdout = None  # Nothing is left to flush it to.


if __name__ == "__main__":
    main()
