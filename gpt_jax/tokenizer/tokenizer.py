"""Text to token ids and back: the interface of every tokenizer, and code that several of them share."""

import codecs
import copy
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing
from gpt_jax.tokenizer.chat_template import CONTROL_TOKEN, Chat

END_OF_TEXT = "<|endoftext|>"
# The end of a document, and the roles of a chat. Text never yields their ids, even if it contains their names.
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TURN = SPECIAL_TOKENS[-1]
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
BYTE_LEVEL_FILE = "vocab.json"  # GPT-2's, with merges.txt beside it.
WORDPIECE_FILE = "vocab.txt"  # BERT's.
TEMPLATE_FILE = "chat_template.jinja"
NO_CHAT = "the tokenizer has no chat template, which says how to write a conversation; take a model made for chat"


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
        """Id of the token that starts every document, such as Llama's <s>, or None."""

    @property
    def end_of_text(self) -> int:
        """Id of <|endoftext|>, or of its equivalent in another vocabulary, which follows every document."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generated text: `end_of_text`, and those that end a turn of a chat."""

    @property
    def chat_template(self) -> str | None:
        """The published Jinja template that renders a conversation as text, or None."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the encoding, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. None is special, and none is added at the start or the end.

        Raises UserError for half of a surrogate pair, which is no text.
        """

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an int32 array, faster for long texts."""

    def cut(self, text: str) -> int:
        """The number of characters of `text`, a part of a longer text, after which that one may be cut in two: the ids
        of what is before, then those of `encode_on` for the rest, are the ids of the whole. 0 if it may be nowhere.

        It is as large as possible, and less than the length of `text` unless any place will do.
        """

    @property
    def chat(self) -> Chat:
        """How conversations are written, by `chat_template`. Raises UserError when there is none."""

    def with_chat_template(self, template: str) -> Self:
        """The same tokenizer with another chat template."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to the start of the next answer. Threads may call it at the same time.

        Each message has a "role" (system, user, assistant, developer or tool) and a "content", a text or OpenAI's list
        of text parts, and what else the template reads. Names of special tokens in it are plain text. Answers are
        encoded apart from what is before them, as they were when the model wrote them. Raises UserError when there is
        no chat template, when the template refuses the conversation, and for other roles and contents.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens appear by name; invalid UTF-8 becomes U+FFFD."""

    def decoder(self, after: Sequence[int] = ()) -> "IncrementalDecoder":
        """A decoder that takes one id at a time, for streaming.

        after: ids of the preceding text, which may decide whether a space stands between.
        """

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """What each token adds to a text before it, by id: UTF-8, of which it may be a part. Special tokens are spelled
        by name, and ids without a token are empty."""

    def save(self, folder: Path) -> Path:
        """Writes the file that defines the tokenizer into `folder`, whole or not at all. Returns its path."""


class IncrementalDecoder(Protocol):
    """Decodes one token at a time.

    The results concatenate to `decode` of all ids or, after a preceding text, to what the ids add to it.
    """

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character lacks bytes."""

    def held(self) -> str:
        """The text of tokens that `push` holds back, as it stands now, without U+FFFD for an incomplete character at
        its end. Tokens to come may change it."""

    def flush(self) -> str:
        """The rest at the end: U+FFFD if the last character is incomplete."""


class ByteDecoder:
    """The incremental decoder of tokens that stand for bytes."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """See IncrementalDecoder."""
        return self._utf8.decode(self._token_bytes[token])

    def held(self) -> str:
        """See IncrementalDecoder. Only bytes of an incomplete character are held back."""
        return ""

    def flush(self) -> str:
        """See IncrementalDecoder."""
        return self._utf8.decode(b"", final=True)


# The end of the longest beginning of a text whose next character is a space after another sign (not U+2581, which many
# vocabularies take for a space), or the first letter or digit of a line after a line that is not blank.
_LAST_CUT = re.compile(r"(?s:.*)(?:(?<=[^\s▁])(?= )|(?<=\S\n)(?=[^\W_]))")


def last_cut(text: str) -> int:
    """The last place where most tokenizers separate a text, whatever is before and after it; 0 if there is none.

    Tokens begin with their space, and may end with newlines; a run of either may be one token, and how it is cut
    depends on what follows.
    """
    found = _LAST_CUT.match(text)
    return found.end() if found else 0


def after_cut(tokenizer: Tokenizer, text: bytes) -> bytes:
    """The end of a part of a text that may be encoded apart from what is before it; all of the part if none may."""
    decoded = text.decode()
    return decoded[tokenizer.cut(decoded) :].encode()


def encode_on(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of the rest of a text after `cut`: without what begins a text, such as a space that is put before it."""
    before = "a" if text.startswith(" ") else "a\n"
    return tokenizer.encode_array(before + text)[len(tokenizer.encode(before)) :]


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


class Chats(ABC):
    """Base of all tokenizers: conversations are written by a template, which is given or published."""

    special_tokens: Mapping[str, int]
    chat_template: str | None
    parts: Mapping[str, str]  # Names of special tokens by their purposes, such as eos_token, for templates.

    @abstractmethod
    def _encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """See Chat.encode."""

    @functools.cached_property
    def chat(self) -> Chat:
        """See Tokenizer."""
        if self.chat_template is None:
            raise UserError(NO_CHAT)
        return Chat(self.chat_template, self.parts, self.special_tokens, self._encode_parts)

    def with_chat_template(self, template: str | None) -> Self:
        """See Tokenizer."""
        other = copy.copy(self)
        other.__dict__.pop("chat", None)
        other.chat_template = template
        return other

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See Tokenizer."""
        return self.chat.prompt(messages)


class Lossless(Chats):
    """Base of the tokenizers made here: no token starts a document, a part of a text is encoded as if it were all of
    it, and a conversation is written by a template that was given, and is saved in a file of its own."""

    end_of_text: int
    begin_of_text: int | None = None
    chat_template: str | None = None
    parts = {"eos_token": END_OF_TEXT}  # noqa: RUF012

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """See Tokenizer."""
        ends_turn = None if self.chat_template is None else self.special_tokens.get(END_OF_TURN)
        return frozenset({self.end_of_text} if ends_turn is None else {self.end_of_text, ends_turn})

    def save_template(self, folder: Path) -> None:
        """Writes the chat template, if there is one, into a file of its own."""
        if self.chat_template is not None:
            save_bytes(folder / TEMPLATE_FILE, self.chat_template.encode())

    def _encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """See Chat.encode."""
        ids = list(self.special_tokens.values())
        return [
            [
                token
                for i, piece in enumerate(CONTROL_TOKEN.split(part))  # Every second piece is an index.
                for token in ([ids[int(piece)]] if i % 2 else self.encode(self.chat.plain(piece)))
            ]
            for part in parts
        ]
