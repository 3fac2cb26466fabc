"""Tokenizers published as a `tokenizer.json`, run by the library `tokenizers`, which defines the format."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.storage.files import save_json
from gpt_jax.tokenizer.chat_template import control
from gpt_jax.tokenizer.splitting import may_be_cut
from gpt_jax.tokenizer.tokenizer import END_OF_TEXT, JSON_FILE, TEMPLATE_FILE, Chats, last_cut, save_bytes, utf8

CONFIG_FILE = "tokenizer_config.json"
TOKENS_FILE = "special_tokens_map.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # Of added tokens.
# The purposes of special tokens, as tokenizer_config.json and chat templates name them.
PARTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers' classes that set add_prefix_space anew, whatever tokenizer.json has, and those of models without a name.
PREFIX_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer")
CLASSES = {
    "gpt2": PREFIX_CLASSES[0],
    **dict.fromkeys(("qwen2", "qwen3"), PREFIX_CLASSES[1]),
    "roberta": PREFIX_CLASSES[2],
}
# Special tokens of these names end an answer, even when no setting says so.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eot|>")

logger = logging.getLogger(__name__)

# More ids without a token than this, and than there are tokens, are an error in the file, not a reserve.
MOST_GAPS = 1 << 16

# At most this many preceding tokens decide how the next one is decoded; if they begin in a run of byte tokens, also the
# rest of the run.
WINDOW = 16

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b if b in _PRINTABLE else 256 + b - sum(p < b for p in _PRINTABLE)): b for b in range(256)}
"""The characters by which byte-level BPE writes bytes: those that can be printed by themselves, the others, in their
order, by those from U+0100 on (Radford et al. 2019)."""


class HuggingFaceTokenizer(Chats):
    """A `tokenizer.json` with the settings of its `tokenizer_config.json`.

    The published rules decide whether decode(encode(text)) == text: byte-level BPE and SentencePiece models are
    lossless, but for U+2581, which the latter take for a space; the `tokenizer.json` of some Llamas loses a leading
    space; BERT's WordPiece keeps neither case nor white space.
    """

    def __init__(self, definition: bytes, settings: Mapping[str, Any]) -> None:
        """definition: the content of `tokenizer.json`. settings: see `read_settings`.

        Raises ValueError when the definition is damaged, or no token ends a text.
        """
        self._definition = definition
        self._tokenizer = tokenizer = _parsed(definition)
        tokenizer.encode_special_tokens = True  # Names of special tokens in a text stay text.
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > 2 * len(ids) + MOST_GAPS:
            raise ValueError(f"it has {len(ids)} tokens, and ids up to {self.vocab_size - 1}")
        parts = {part: settings[part] for part in PARTS if settings.get(part) in ids}
        stop_ids = [i for i in settings.get("stop_ids", ()) if type(i) is int and i in range(self.vocab_size)]
        fallbacks = (*map(tokenizer.id_to_token, stop_ids), parts.get("sep_token"), END_OF_TEXT)
        end_names = [name for name in (parts.get("eos_token"), *fallbacks) if name in ids]
        if not end_names:
            raise ValueError(f"it has no token that ends a text; name one as eos_token in {CONFIG_FILE}")
        self.parts = {**parts, "eos_token": end_names[0]}
        others = settings.get("extra_special_tokens") or []
        ends = {name for part, name in self.parts.items() if part in ("bos_token", "eos_token")}
        self._marked = _not_of_text(tokenizer, {*self.parts.values(), *others} & {*ids}, ends)
        _mark_special(tokenizer, self._marked)

        added = sorted(tokenizer.get_added_tokens_decoder().items())
        self.special_tokens = {token.content: i for i, token in added if token.special}
        _hide_pieces(tokenizer, {*self.special_tokens})
        self.end_of_text: int = ids[end_names[0]]
        self.begin_of_text = _begin_of_text(tokenizer)
        self._settings: dict[str, Any] = {"stop_ids": stop_ids}
        if others:
            self._settings["extra_special_tokens"] = others
        if "add_bos_token" in settings:
            self._settings["add_bos_token"] = settings["add_bos_token"]
            self.begin_of_text = ids.get(parts.get("bos_token")) if settings["add_bos_token"] else None
        for part in ("bos_token", "eos_token"):
            name, there = self.parts.get(part), settings.get(f"{part}_ids")
            if name in ids and there and ids[name] not in there:
                counts = "both end a text" if part == "eos_token" else "the tokenizer's counts"
                logger.warning(
                    "%s is %s (%d) in the tokenizer, %s in the model; %s", part, name, ids[name], there, counts
                )
        turn_ends = [self.special_tokens[name] for name in END_OF_TURN if name in self.special_tokens]
        self.stop_ids = frozenset({self.end_of_text, *stop_ids, *turn_ends})
        self.chat_template: str | None = settings.get("chat_template")
        # SentencePiece puts a space before every text. The library's rule leaves out texts that begin with one.
        self._spaced: tuple[str, ...] = ()
        if settings.get("add_dummy_prefix") is True:
            self._settings["add_dummy_prefix"] = True
            pieces = tokenizer.get_vocab(with_added_tokens=False)
            self._spaced = (" ", "▁", *(t.content for _, t in added if not t.special and t.content in pieces))
        # What a text begins with may be made or removed by its normalization, which must come first.
        self._normalizer = tokenizer.normalizer if self._spaced else None
        if self._normalizer is not None:
            tokenizer.normalizer = None
        boundaries = json.dumps([self.begin_of_text, self.end_of_text, *(["add_dummy_prefix"] if self._spaced else [])])
        self.fingerprint = hashlib.sha256(definition + boundaries.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._encode(text, self._tokenizer)

    def encode_array(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.array(self._encode(text, self._tokenizer), np.int32)

    def cut(self, text: str) -> int:
        """See Tokenizer."""
        return last_cut(text) if self._may_be_cut else 0

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary."""
        i: int | None = self._tokenizer.token_to_id(token)
        return i

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def decoder(self, after: Sequence[int] = ()) -> "WindowDecoder":
        """See Tokenizer. Tokens that start or end a document are no text that a space could follow."""
        boundaries = (self.begin_of_text, self.end_of_text)
        start = max(0, len(after) - WINDOW)
        while start > 0 and after[start] in self._byte_tokens:
            start -= 1
        return WindowDecoder(self, self._byte_tokens, [i for i in after[start:] if i not in boundaries])

    def save(self, folder: Path) -> Path:
        """See Tokenizer. Also writes `tokenizer_config.json`."""
        save_json(folder / CONFIG_FILE, self.config())
        return save_bytes(folder / JSON_FILE, self._definition)

    def rules(self) -> dict[str, Any]:
        """The content of `tokenizer.json`, every default spelled out."""
        tokenizer = _parsed(self._definition)
        _mark_special(tokenizer, self._marked)
        rules: dict[str, Any] = json.loads(tokenizer.to_str())
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

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        utf8(text)
        if self._normalizer is not None and tokenizer is self._tokenizer:
            normalized = self._normalizer.normalize_str(text)
            text = f"▁{normalized}" if normalized or (text and self._normalizer.normalize_str(" ")) else ""
        elif text.startswith(self._spaced):
            text = f"▁{text}"
        # The method for batches omits the tokens' offsets in the text, which take a third of the time.
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """See Chat.encode."""
        plain = [self.chat.plain(part) for part in parts]
        tokenizer, ids_of = self._chat_tokenizer
        encoded = [self._encode(plain[0], tokenizer)] if plain else []
        encoded += [self._encode_after(part, tokenizer) for part in plain[1:]]
        return [[ids_of.get(i, i) for i in ids] for ids in encoded]

    def _encode_after(self, text: str, tokenizer: Any) -> list[int]:
        """The ids of a text that follows another one, without what the rules put before every text, such as a space.

        They are those after a few signs, of the first that stand apart from the text; the text as it is, if none do."""
        if self._begins_alike or not text:
            return self._encode(text, tokenizer)
        for before in ("\n", "a\n", "a"):
            first, both = (self._encode(t, tokenizer) for t in (before, before + text))
            if both[: len(first)] == first:
                return both[len(first) :]
        return self._encode(text, tokenizer)

    @functools.cached_property
    def _begins_alike(self) -> bool:
        """True if a text is encoded in the same way at the start and after another one."""
        return all(self.decode([*self.encode("b"), *self.encode(text)]) == f"b{text}" for text in ("a", " a", "\n"))

    @functools.cached_property
    def _chat_tokenizer(self) -> tuple[Any, dict[int, int]]:
        """The library's tokenizer, to which CONTROL i END is special token i, and names of special tokens are text; and
        the ids of its added tokens, which it numbers anew, as they should be.

        It is an object of its own, since threads may encode texts with the other one at the same time."""
        rules = self.rules()
        codes = {name: control(i) for i, name in enumerate(self.special_tokens)}
        original = {codes.get(token["content"], token["content"]): token["content"] for token in rules["added_tokens"]}
        for token in rules["added_tokens"]:
            token["content"] = codes.get(token["content"], token["content"])
        tokenizer = _parsed(json.dumps(rules).encode())
        _hide_pieces(tokenizer, {*self.special_tokens})
        ids_of = {i: self.id_of(original[token.content]) for i, token in tokenizer.get_added_tokens_decoder().items()}
        return tokenizer, {i: actual for i, actual in ids_of.items() if actual is not None}

    @functools.cached_property
    def _may_be_cut(self) -> bool:
        unknown = self._tokenizer.token_to_id(getattr(self._tokenizer.model, "unk_token", None) or "")
        return may_be_cut(self.rules(), unknown not in self.encode("a \na"))

    @functools.cached_property
    def token_bytes(self) -> Sequence[bytes]:
        """See Tokenizer."""
        if "ByteLevel" in str(json.loads(self._definition).get("decoder")):
            pieces = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
            return [
                bytes(map(BYTES.__getitem__, piece)) if BYTES.keys() >= {*piece} else piece.encode() for piece in pieces
            ]
        before = self.encode("a")
        n = len(self.decode(before))
        texts = self._tokenizer.decode_batch([[*before, i] for i in range(self.vocab_size)], skip_special_tokens=False)
        names = {i: self._tokenizer.id_to_token(i) for i in self._byte_tokens}
        return [bytes([int(names[i][3:5], 16)]) if i in names else text[n:].encode() for i, text in enumerate(texts)]

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


def from_tokenizer_json(definition: bytes, folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`, with what the files in its folder say of it. Raises ValueError.

    Where its tokenizer_config.json says something else, it is as in transformers 5: `tokenizer.json` decides what
    begins a text and which ids tokens have, tokenizer_config.json how added tokens are matched, and whether one of
    PREFIX_CLASSES puts a space before a text. Each difference is logged.
    """
    settings = read_settings(folder)
    if "stop_ids" in read_json(folder / CONFIG_FILE):  # Both were written by `save`.
        return HuggingFaceTokenizer(definition, settings)
    rules = json.loads(definition)
    changed = False
    splitting = rules.get("pre_tokenizer") or {}
    before, class_name = settings.get("add_prefix_space"), settings["class_name"]
    for step in splitting.get("pretokenizers", [splitting]) if class_name.startswith(PREFIX_CLASSES) else ():
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space") != (before is True):
            source = f"a {class_name} has it by default" if before is None else f"{CONFIG_FILE} has it"
            logger.warning("add_prefix_space is %s, as %s, not as %s", before is True, source, JSON_FILE)
            step["add_prefix_space"], changed = before is True, True
    added = {token["content"]: token for token in rules.get("added_tokens") or ()}
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        name = token["content"]
        here = added.get(name)
        if here is None or here["id"] != int(i):
            count = here["id"] if here else "no added token"
            logger.warning("%s is %s, as %s has it, not %s, as %s has it", name, count, JSON_FILE, i, CONFIG_FILE)
            continue
        token = {**token, "special": token.get("special") or here.get("special")}  # Special for one is special.
        if flags := {key: token[key] for key in FLAGS if token.get(key, here.get(key)) != here.get(key)}:
            logger.warning("%s has the flags %s, as %s has them, not as %s", name, flags, CONFIG_FILE, JSON_FILE)
            here.update(flags)
            changed = True
    asked = settings.pop("add_bos_token", None)
    tokenizer = HuggingFaceTokenizer(json.dumps(rules).encode() if changed else definition, settings)
    for name, token in added.items():
        if name and (i := tokenizer.id_of(name)) != token["id"]:
            logger.warning("%s has the id %s, not %s, as added_tokens in %s has it", name, i, token["id"], JSON_FILE)
    if asked is not None and asked != (tokenizer.begin_of_text is not None):
        adds = "a token begins" if tokenizer.begin_of_text is not None else "no token begins"
        logger.warning("%s every text, as %s has it, not as add_bos_token in %s", adds, JSON_FILE, CONFIG_FILE)
    return tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a tokenizer in a folder from the hub: everything but the vocabulary.

    The keys are those of tokenizer_config.json, with tokens by name, with the chat template from whichever file has it,
    and with `stop_ids`, which end a generated text. Where two files differ, it is as in transformers 5, and the
    difference is logged: special_tokens_map.json counts before a tokenizer_config.json without added_tokens_decoder,
    chat_template.jinja before every other place, generation_config.json before config.json. Raises ValueError naming a
    damaged file; a damaged chat template is logged, since texts can do without.
    """
    config = _by_name(read_json(folder / CONFIG_FILE))
    other = _by_name(read_json(folder / TOKENS_FILE))
    saved = "stop_ids" in config  # By us, so that all files agree.
    first = saved or "added_tokens_decoder" in config
    for part in PARTS:
        if config.get(part) and other.get(part) and config[part] != other[part]:
            used, unused = (CONFIG_FILE, TOKENS_FILE) if first else (TOKENS_FILE, CONFIG_FILE)
            value = (config if first else other)[part]
            logger.warning("%s is %s, as %s has it, not as %s", part, value, used, unused)
    given = {key: value for key, value in other.items() if value is not None}
    settings = {**given, **config} if first else {**config, **given}
    settings["chat_template"] = _template(folder, settings.get("chat_template"))
    if not isinstance(settings.get("stop_ids", []), list):
        raise ValueError(f"the stop_ids in {CONFIG_FILE} beside it are no list")
    if not saved:
        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        for part in ("bos_token", "eos_token"):
            ids = [found for found in (generation.get(f"{part}_id"), model.get(f"{part}_id")) if found is not None]
            ids = [found if isinstance(found, list) else [found] for found in ids]
            settings[f"{part}_ids"] = ids[0] if ids else []
            if len(ids) == 2 and not {*ids[1]} <= {*ids[0]}:
                logger.warning(
                    "%s_id is %s, as generation_config.json has it, not %s, as config.json has it", part, *ids
                )
        if settings["eos_token_ids"]:
            settings["stop_ids"] = settings["eos_token_ids"]
        settings["class_name"] = str(settings.get("tokenizer_class") or CLASSES.get(str(model.get("model_type")), ""))
    return settings


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which tokens, which may be objects with their properties, are names."""
    others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    others = others.values() if isinstance(others, dict) else others if isinstance(others, list) else []
    names = {part: _name(settings[part]) for part in PARTS if part in settings}
    if damaged := [part for part, name in names.items() if name is None and settings[part] is not None]:
        raise ValueError(
            f"{damaged[0]} is {settings[damaged[0]]!r:.60} in a file beside it, which is no name of a token"
        )
    more = {"extra_special_tokens": [name for name in map(_name, others) if name]} if others else {}
    return {**settings, **names, **more}


def _template(folder: Path, template: Any) -> str | None:
    """The chat template of a folder: that of a file of its own, or that in the settings, of several that named default.

    None when there is none, or none that can be used, which is logged.
    """
    given = template
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)]
        template = {t["name"]: t.get("template") for t in named}
    if isinstance(template, dict):
        template = template.get("default")
    if given and not isinstance(template, str):
        logger.warning("the chat_template in %s is no text, nor several by name with a default", CONFIG_FILE)
    if (folder / TEMPLATE_FILE).is_file():
        try:
            file_template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        except ValueError:
            logger.warning("%s is not UTF-8 text, and not used", TEMPLATE_FILE)
        else:
            if isinstance(template, str) and template != file_template:
                logger.warning("the chat template is that of %s, not the other one in %s", TEMPLATE_FILE, CONFIG_FILE)
            template = file_template
    return template if isinstance(template, str) else None


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
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # It makes the tokens random, which transformers leaves as it is.
    return tokenizer


def _not_of_text(tokenizer: Any, names: Set[str], ends: Set[str]) -> list[str]:
    """Those of the names, which settings call special, that the tokenizer takes for no part of a text.

    A name that text yields by itself is ordinary text, such as a `"pad_token": "!"`. transformers makes a special token
    of it, and cuts every text there. So do we of those in `ends`, which begin or end texts, where `_hide_pieces` can.
    """
    from tokenizers.models import BPE

    certain = frozenset[str]() if isinstance(tokenizer.model, BPE) else ends
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def of_text(name: str) -> bool:
        encodings = ((c, tokenizer.encode(c + name, add_special_tokens=False)) for c in ("", "a", "1", " ", "\n"))
        return any(
            (tokenizer.token_to_id(name), (len(before), len(before + name))) in zip(e.ids, e.offsets, strict=True)
            for before, e in encodings
        )

    return sorted(name for name in names - known if name in certain or not of_text(name))


def _mark_special(tokenizer: Any, names: Sequence[str]) -> None:
    """Adds names of the vocabulary as special tokens."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _hide_pieces(tokenizer: Any, names: Set[str]) -> None:
    """Takes the pieces of special tokens out of the model, which else finds them in a text by itself.

    So `</s>` in a text is spelled as SentencePiece spells it, and is unknown to a vocabulary of words. BPE needs
    nothing, since no merge yields such a piece. All other pieces, scores and ids stay, those of the tokens as well.
    """
    from tokenizers.models import BPE

    if isinstance(tokenizer.model, BPE):
        return
    state = json.loads(tokenizer.model.__getstate__())
    del state["type"]
    hidden, vocabulary = names - {state.get("unk_token")}, state["vocab"]
    if isinstance(vocabulary, dict):
        state["vocab"] = {piece: i for piece, i in vocabulary.items() if piece not in hidden}
    else:  # A unigram model's, whose ids are places: no text contains the empty piece.
        state["vocab"] = [("" if piece in hidden else piece, score) for piece, score in vocabulary]
    tokenizer.model = type(tokenizer.model)(**state)  # Not from JSON, of which the library rounds some scores.


def _begin_of_text(tokenizer: Any) -> int | None:
    """The id of the token that the rules put before a text, or None. Raises ValueError when they name an unknown one,
    at which the library would panic."""
    if tokenizer.post_processor is None:
        return None
    rules = json.loads(tokenizer.post_processor.__getstate__())
    for step in rules.get("processors", [rules]):
        pieces = [*step.get("single", ()), *step.get("pair", ())]
        names = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if missing := names - {*step.get("special_tokens", ())}:
            raise ValueError(f"its post_processor names {', '.join(sorted(missing))}, which it does not define")
    encoding = tokenizer.encode("a")
    return encoding.ids[0] if sum(encoding.special_tokens_mask[:1]) else None
