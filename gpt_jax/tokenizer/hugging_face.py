"""Tokenizers published as a `tokenizer.json`, run by the library `tokenizers`, which defines the format."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.files import save_json
from gpt_jax.tokenizer import chat_template
from gpt_jax.tokenizer.tokenizer import END_OF_TEXT, JSON_FILE, NO_CHAT, save_bytes, utf8

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# The purposes of special tokens, as tokenizer_config.json and chat templates name them.
PARTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Special tokens of these names end an answer, even when no setting says so.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eot|>")

# Breaks the names of special tokens in a message, so that a user who types one does not end a turn.
ZERO_WIDTH_SPACE = "\u200b"


WINDOW = 16  # At most this many preceding tokens decide how the next one is decoded.


class HuggingFaceTokenizer:
    """A `tokenizer.json` with the settings of its `tokenizer_config.json`.

    The published rules decide whether decode(encode(text)) == text: byte-level BPE is lossless; Llama's SentencePiece
    loses a leading space; BERT's WordPiece keeps neither case nor white space.
    """

    def __init__(self, definition: bytes, settings: Mapping[str, Any]) -> None:
        """definition: the content of `tokenizer.json`. settings: see `read_settings`.

        Raises ValueError when the definition is damaged, or no token ends a text.
        """
        self._definition = definition
        self._tokenizer = tokenizer = _parsed(definition)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        parts = {part: settings[part] for part in PARTS if settings.get(part) in ids}
        stop_ids = [i for i in settings.get("stop_ids", ()) if i in range(self.vocab_size)]
        fallbacks = (*map(tokenizer.id_to_token, stop_ids), parts.get("sep_token"), END_OF_TEXT)
        end_names = [name for name in (parts.get("eos_token"), *fallbacks) if name in ids]
        if not end_names:
            raise ValueError(f"it has no token that ends a text; name one as eos_token in {CONFIG_FILE}")
        self.parts = {**parts, "eos_token": end_names[0]}
        _mark_special(tokenizer, self.parts.values())

        self.special_tokens = {
            token.content: i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special
        }
        self.end_of_text: int = ids[end_names[0]]
        self.begin_of_text = _begin_of_text(tokenizer)
        self._settings = {"stop_ids": stop_ids}
        if "add_bos_token" in settings:
            self._settings["add_bos_token"] = settings["add_bos_token"]
            self.begin_of_text = ids.get(parts.get("bos_token")) if settings["add_bos_token"] else None
        turn_ends = [self.special_tokens[name] for name in END_OF_TURN if name in self.special_tokens]
        self.stop_ids = frozenset({self.end_of_text, *stop_ids, *turn_ends})
        self.chat_template: str | None = settings.get("chat_template")
        boundaries = json.dumps([self.begin_of_text, self.end_of_text]).encode()
        self.fingerprint = hashlib.sha256(definition + boundaries).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.array(self._encode(text), np.int32)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See Tokenizer. Names of special tokens in a message are broken by a zero-width space."""
        if self.chat_template is None:
            raise UserError(NO_CHAT)
        plain = [{**message, "content": self._without_names(message["content"])} for message in messages]
        text = chat_template.render(self.chat_template, plain, self.parts)
        self._tokenizer.encode_special_tokens = False
        try:
            return self._encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def decoder(self, after: Sequence[int] = ()) -> "WindowDecoder":
        """See Tokenizer. Tokens that start or end a document are no text that a space could follow."""
        boundaries = (self.begin_of_text, self.end_of_text)
        return WindowDecoder(self, self._byte_tokens, [i for i in after[-WINDOW:] if i not in boundaries])

    def save(self, folder: Path) -> Path:
        """See Tokenizer. Also writes `tokenizer_config.json`."""
        save_json(folder / CONFIG_FILE, self.config())
        return save_bytes(folder / JSON_FILE, self._definition)

    def rules(self) -> dict[str, Any]:
        """The content of `tokenizer.json`, every default spelled out."""
        rules: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return rules

    def config(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json`, for `read_settings` and for transformers."""
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.parts,
            **self._settings,
            **template,
        }

    def _encode(self, text: str) -> list[int]:
        utf8(text)
        # The method for batches omits the tokens' offsets in the text, which take a third of the time.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _without_names(self, text: str) -> str:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"
        return re.sub(names, lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], text)

    @functools.cached_property
    def _byte_tokens(self) -> frozenset[int]:
        """Ids of the tokens of one byte in which the vocabulary spells rare characters; empty where it has none."""
        if "ByteFallback" not in str(json.loads(self._definition).get("decoder")):
            return frozenset()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        return frozenset(i for token, i in ids.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))


class WindowDecoder:
    """The incremental decoder for any of the library's rules of decoding.

    The text of a token is the difference that it makes to a window, the text of the tokens shown last. A window is
    enough because the rules treat only the first token of a text specially and join all others one by one. Tokens are
    held back while a character is incomplete, and byte tokens to the end of their run, which is valid only as a whole.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, byte_tokens: frozenset[int], shown: list[int]) -> None:
        self._tokenizer, self._byte_tokens, self._shown = tokenizer, byte_tokens, shown
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """See IncrementalDecoder."""
        self._held.append(token)
        text = "" if token in self._byte_tokens else self._new_text()
        if not text or text.endswith("\ufffd"):  # The character may be incomplete.
            return ""
        self._shown, self._held = self._held, []
        return text

    def held(self) -> str:
        """See IncrementalDecoder."""
        return self._new_text().rstrip("\ufffd")

    def flush(self) -> str:
        """See IncrementalDecoder."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a tokenizer in a folder from the hub: everything but the vocabulary.

    The keys are those of tokenizer_config.json, with tokens by name, with the chat template from whichever file has it,
    and with `stop_ids`, which end a generated text. Raises ValueError naming a damaged file.
    """
    settings = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / CONFIG_FILE)}
    settings |= {part: _name(settings[part]) for part in PARTS if part in settings}
    template = settings.get("chat_template")
    if isinstance(template, list):  # Several templates, by name.
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / TEMPLATE_FILE).is_file():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    for file in ("generation_config.json", "config.json"):
        stop = read_json(folder / file).get("eos_token_id") if "stop_ids" not in settings else None
        if stop is not None:
            settings["stop_ids"] = stop if isinstance(stop, list) else [stop]
    if not isinstance(template, str | None):
        raise ValueError(f"the chat template in {CONFIG_FILE} beside it is no text")
    if not isinstance(settings.get("stop_ids", []), list):
        raise ValueError(f"the stop_ids in {CONFIG_FILE} beside it are no list")
    return {**settings, "chat_template": template}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if the file is missing. Raises ValueError naming a damaged file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} beside it is damaged ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} beside it is not a JSON object")
    return value


def _name(token: Any) -> str | None:
    """The name of a token that is given as a string, or as an object with its properties."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _parsed(definition: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f"{JSON_FILE} needs the package tokenizers: pip install 'gpt-jax[interop]'") from None
    try:
        tokenizer = Tokenizer.from_str(definition.decode())
    except Exception as e:  # The library raises no narrower class.
        raise ValueError(f"the library tokenizers refuses it ({e})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # Names of special tokens in a text stay text.
    return tokenizer


def _mark_special(tokenizer: Any, names: Any) -> None:
    """Adds names that are no added tokens yet as special tokens, so that text does not yield them."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in {*names} - known])


def _begin_of_text(tokenizer: Any) -> int | None:
    """The id of the token that the rules put before a text, or None."""
    encoding = tokenizer.encode("a")
    return encoding.ids[0] if sum(encoding.special_tokens_mask[:1]) else None
