"""What workers make of conversations, preferences and problems: documents of tokens, and what stands beside them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.data.records import RecordError
from gpt_jax.data.shards import token_dtype
from gpt_jax.tokenizer.chat_template import Chat
from gpt_jax.tokenizer.tokenizer import Tokenizer

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates that write the date write into prepared conversations, so that the same ones give the same tokens on
any day. It is the day that Llama 3's name where they cannot tell it."""


class Document(NamedTuple):
    """Tokens that are stored one after the other."""

    tokens: list[int]
    learnt: list[bool]  # For each token.
    lengths: tuple[int, ...] = ()  # Of a preference: tokens of the prompt and of both answers.
    line: str = ""  # Of a problem: its fields as JSON.


Encoder = Callable[[Tokenizer, Chat, dict[str, Any]], tuple[list[Document], Counter[str]]]
"""Makes the documents of a record and what they count, or raises RecordError. Records are as `tuning.line_of` writes
them."""


class Encoded(NamedTuple):
    """What became of some records."""

    tokens: np.ndarray  # As they are stored, of all documents.
    learnt: np.ndarray  # bool, for each token.
    ends: np.ndarray  # int64, the place after the last token of each document.
    lengths: np.ndarray  # int64 (documents, parts): see Document.
    lines: list[str]  # Of each document: see Document.
    counts: Counter[str]  # Of records, of documents, of answers that are learnt, of bytes of their text.
    refused: list[tuple[int, str, str]]  # Which records were, the reason for counting, and the error.


def encode_records(tokenizer: Tokenizer, lines: bytes, encoder: Encoder) -> bytes:
    """The `Encoded` of records in JSON Lines, which `unpacked` reads."""
    chat = dataclasses.replace(tokenizer.chat, now=lambda: TEMPLATE_DATE)
    made, counts, refused = list[Document](), Counter[str](), list[tuple[int, str, str]]()
    for i, line in enumerate(lines.splitlines()):
        try:
            documents, found = encoder(tokenizer, chat, json.loads(line))
        except RecordError as e:
            refused.append((i, e.reason, str(e)))
        else:
            made += documents
            counts += found
    header = {
        "sizes": [len(document.tokens) for document in made],
        "lengths": [document.lengths for document in made],
        "lines": [document.line for document in made],
        "counts": counts,
        "refused": refused,
    }
    tokens = np.array([t for document in made for t in document.tokens], token_dtype(tokenizer.vocab_size))
    learnt = np.array([x for document in made for x in document.learnt], bool)
    return json.dumps(header).encode() + b"\n" + tokens.tobytes() + learnt.tobytes()


def unpacked(content: bytes, vocab_size: int) -> Encoded:
    """What `encode_records` packed."""
    header, _, arrays = content.partition(b"\n")
    fields, dtype = json.loads(header), token_dtype(vocab_size)
    ends = np.cumsum(fields["sizes"], dtype=np.int64)
    n = int(ends[-1]) if len(ends) else 0
    tokens = np.frombuffer(arrays, dtype, n)
    learnt = np.frombuffer(arrays, bool, n, offset=n * dtype.itemsize)
    lengths = np.array(fields["lengths"], np.int64)
    refused = [tuple(refusal) for refusal in fields["refused"]]
    return Encoded(tokens, learnt, ends, lengths, fields["lines"], Counter(fields["counts"]), refused)
