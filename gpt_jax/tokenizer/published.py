"""Tokenizers in the formats before `tokenizer.json`, and in GGUF files, converted to the terms of `tokenizer.json`.

There are three kinds: SentencePiece models such as Llama's, the byte-level BPE of GPT-2 (`vocab.json` and
`merges.txt`), and the WordPiece of BERT (`vocab.txt`), which Chinese GPT-2 models use.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UserError
from gpt_jax.tokenizer.hugging_face import (
    CONFIG_FILE,
    FLAGS,
    PARTS,
    HuggingFaceTokenizer,
    read_json,
    read_settings,
)
from gpt_jax.tokenizer.splitting import GPT2_NAMES, LLAMA3, PATTERNS, QWEN2, SINGLE_DIGITS_NAMES, TEKKEN
from gpt_jax.tokenizer.tokenizer import BYTE_LEVEL_FILE

logger = logging.getLogger(__name__)


class Kind(IntEnum):
    """The kinds of pieces in a vocabulary, numbered as in SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A token of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


def from_vocabulary(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a `vocab.json` with `merges.txt` beside it, or of a `vocab.txt`.

    Raises ValueError when it is damaged, FileNotFoundError when the merges are missing.
    """
    settings = read_settings(path.parent)
    if path.name != BYTE_LEVEL_FILE:
        return _wordpiece(path.read_text(encoding="utf-8-sig"), settings)
    lines = path.with_name("merges.txt").read_text(encoding="utf-8-sig").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocabulary = json.loads(path.read_bytes())
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ValueError("it is not a JSON object of ids by token")
    if len({*vocabulary.values()}) < len(vocabulary):
        raise ValueError("two of its tokens have the same id")
    rules = "qwen2" if str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer") else "gpt-2"
    tokenizer = _byte_level(vocabulary, merges, rules, settings.get("add_prefix_space") is True)
    _add_tokens(tokenizer, settings, path.parent)
    return finished(tokenizer, settings)


def from_sentencepiece(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a SentencePiece model, which encodes as SentencePiece does, and chats as transformers'
    LlamaTokenizer.

    LlamaTokenizer puts no space before a text that begins with one, so that decoding loses this space. Neither puts one
    after a special token, as llama.cpp does. Normalization by a table is that of the library tokenizers, which drops
    some combining marks. Raises ValueError when the file is damaged or of a type other than bpe and unigram.
    """
    model = sentencepiece_proto(path.read_bytes())
    spec = model.trainer_spec
    if spec.model_type not in (spec.BPE, spec.UNIGRAM):
        raise ValueError("it is a SentencePiece model of words or characters; bpe and unigram are supported")
    if spec.treat_whitespace_as_suffix:
        raise ValueError("it is a SentencePiece model whose tokens end with their spaces, which is not supported")
    settings = read_settings(path.parent)
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    names = {part: model.pieces[i].piece for part, i in ids.items() if 0 <= i < len(model.pieces)}
    settings = {**names, **{key: value for key, value in settings.items() if value is not None}}
    asked = settings.get("add_prefix_space")
    space_before = model.normalizer_spec.add_dummy_prefix if asked is None else bool(asked)
    tokenizer = _sentencepiece(
        sentencepiece_pieces(model),
        unigram=spec.model_type == spec.UNIGRAM,
        space_before=space_before,
        charsmap=model.normalizer_spec.precompiled_charsmap,
        single_spaces=model.normalizer_spec.remove_extra_whitespaces,
    )
    _add_tokens(tokenizer, settings, path.parent)
    return finished(tokenizer, {"add_bos_token": True, **settings, "add_dummy_prefix": space_before})


def sentencepiece_proto(content: bytes) -> Any:
    """The content of a SentencePiece model's file. Raises ValueError when it is damaged."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as e:  # Its class depends on the build of protobuf.
        raise ValueError(f"it is not a SentencePiece model, or damaged ({e})") from None
    return model


def sentencepiece_pieces(model: Any) -> list[Piece]:
    """The vocabulary of a SentencePiece model, by id."""
    return [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]


def gguf_tokenizer(fields: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer described by the metadata of a GGUF file; fields: str, int or list by key.

    Raises UserError when a key is missing, and when the kind of vocabulary is not supported.
    """
    prefix = "tokenizer.ggml."
    own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    try:
        kind, pre, tokens = own["model"], own.get("pre", "default"), own["tokens"]
        types = own.get("token_type") or [Kind.NORMAL] * len(tokens)
        if kind == "llama":
            if "token_type" not in own:  # The names of the bytes tell them.
                types = [Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else Kind.NORMAL for token in tokens]
            pieces = [Piece(*piece) for piece in zip(tokens, own["scores"], types, strict=True)]
            if not all(math.isfinite(piece.score) for piece in pieces):
                raise ValueError("a score is no finite number")
            space_before = bool(own.get("add_space_prefix", True))
            tokenizer = _sentencepiece(pieces, space_before)
        elif kind == "gpt2":
            tokenizer = _byte_level({token: i for i, token in enumerate(tokens)}, own["merges"], pre)
            _add_by_kind(tokenizer, tokens, types)
        else:
            raise UserError(f"the GGUF file has a tokenizer of model {kind!r}; gpt2 and llama are supported")
        ids = {part: own.get(key) for part, key in zip(PARTS, _GGUF_IDS, strict=True)}
        absent = (None, -1, 2**32 - 1)  # llama.cpp's number for no token, -1, may be stored without a sign.
        if impossible := [i for i in ids.values() if i not in absent and not 0 <= i < len(tokens)]:
            raise ValueError(f"a special token has the id {impossible[0]}, and there are {len(tokens)} tokens")
        settings: dict[str, Any] = {part: tokens[i] for part, i in ids.items() if i not in absent}
        settings["stop_ids"] = [own[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in own]
        settings["add_bos_token"] = own.get("add_bos_token", kind == "llama" or PATTERNS.get(pre) == LLAMA3)
        template = fields.get("tokenizer.chat_template")
        settings["chat_template"] = template if isinstance(template, str) else None
        settings["add_dummy_prefix"] = kind == "llama" and space_before
        return finished(tokenizer, settings)
    except KeyError as e:
        raise UserError(f"the GGUF file has no {prefix}{e.args[0]}, without which there is no tokenizer") from None
    except (ValueError, IndexError, TypeError, AttributeError) as e:  # A value of the wrong type.
        raise UserError(f"the tokenizer in the GGUF file is damaged: {' '.join(str(e).split())}") from e


_GGUF_IDS = (  # In the order of PARTS.
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "seperator_token_id",  # Spelled so in the format.
    "padding_token_id",
    "cls_token_id",
    "mask_token_id",
)


def bpe_model(pieces: Sequence[Piece]) -> Any:
    """SentencePiece's BPE as a model of the library.

    SentencePiece merges whichever neighbours form the piece with the highest score; the library needs the pairs that
    may be merged, best first. Special pieces are never merged from text.
    """
    from tokenizers.models import BPE

    ids = {piece.text: i for i, piece in enumerate(pieces)}
    mergeable = sorted((p for p in pieces if p.kind == Kind.NORMAL), key=lambda p: -p.score)
    parts = {piece.text for piece in mergeable}
    merges = [
        (piece.text[:cut], piece.text[cut:])
        for piece in mergeable
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in parts and piece.text[cut:] in parts
    ]
    byte_fallback = any(piece.kind == Kind.BYTE for piece in pieces)
    unknown = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    return BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def unigram_model(pieces: Sequence[Piece]) -> Any:
    """SentencePiece's unigram model as a model of the library. Text hardly becomes a special piece, and never where
    HuggingFaceTokenizer takes them out."""
    from tokenizers.models import Unigram

    normal = (Kind.NORMAL, Kind.USER_DEFINED)
    lowest = min((piece.score for piece in pieces if piece.kind in normal), default=0.0) - 1000
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN), None)
    return Unigram(
        [(piece.text, piece.score if piece.kind in normal else lowest) for piece in pieces],
        unk_id=unknown,
        byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
    )


def _sentencepiece(
    pieces: Sequence[Piece],
    space_before: bool,
    unigram: bool = False,
    charsmap: bytes = b"",
    single_spaces: bool = False,
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(unigram_model(pieces) if unigram else bpe_model(pieces))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if single_spaces:  # Of spaces alone: SentencePiece leaves newlines and the like.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    # Not "always", which would put a space after each special token within the text, too.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if space_before else "never", split=False)
    strip = [decoders.Strip(" ", left=1)] if space_before else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_by_kind(tokenizer, [piece.text for piece in pieces], [piece.kind for piece in pieces])
    return tokenizer


def _byte_level(vocabulary: dict[str, int], merges: Sequence[str], pre: str, space_before: bool = False) -> Any:
    """Byte-level BPE. pre: GGUF's name for how text is split first. Raises UserError when it is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pattern = PATTERNS.get(pre)
    if pattern is None and pre not in (*GPT2_NAMES, *SINGLE_DIGITS_NAMES):
        known = ", ".join(sorted([*PATTERNS, *GPT2_NAMES, *SINGLE_DIGITS_NAMES]))
        raise UserError(f"the GGUF file's tokenizer.ggml.pre is {pre!r}, which is not known; supported are {known}")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        model = BPE(vocabulary, pairs, ignore_merges=pattern in (LLAMA3, TEKKEN))
    except Exception as e:  # The library raises nothing more definite.
        raise ValueError(f"its merges do not fit its vocabulary ({e})") from None
    tokenizer = Tokenizer(model)
    if pattern == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=space_before, use_regex=pattern is None)
    splitters: list[Any] = []
    if pattern is not None:
        splitters = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    elif pre in SINGLE_DIGITS_NAMES:
        splitters = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encodes_as_qwen2(tokenizer: HuggingFaceTokenizer) -> bool:
    """True when transformers' Qwen2Tokenizer, which reads only vocabulary and merges from a folder and has fixed rules
    for the rest, encodes as `tokenizer` does."""
    own, qwen2 = tokenizer.rules(), json.loads(_byte_level({}, [], "qwen2").to_str())
    for rules in (own, qwen2):
        for step in (rules["pre_tokenizer"] or {}).get("pretokenizers", []):
            step.pop("trim_offsets", None)  # Changes the offsets of tokens, not the tokens.
    options = [{k: v or None for k, v in r["model"].items() if k not in ("vocab", "merges")} for r in (own, qwen2)]
    return options[0] == options[1] and all(own[part] == qwen2[part] for part in ("normalizer", "pre_tokenizer"))


def _wordpiece(vocabulary: str, settings: Mapping[str, Any]) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    ids = {token: i for i, token in enumerate(vocabulary.removesuffix("\n").split("\n"))}
    defaults = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    named = {key: value for key, value in settings.items() if value is not None}
    settings = {**defaults, "mask_token": "[MASK]", **named}
    missing = [settings[part] for part in defaults if settings[part] not in ids]
    if missing:
        raise ValueError(f"it is not the vocabulary of a BERT: it has no {', '.join(missing)}")
    unknown, begin, end = settings["unk_token"], settings["cls_token"], settings["sep_token"]
    tokenizer = Tokenizer(WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, ids[begin]), (end, ids[end])]
    )
    return finished(tokenizer, settings)


def _add_by_kind(tokenizer: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Makes control and unknown pieces special, and lets user-defined ones match in a text before all others."""
    from tokenizers import AddedToken

    special, within_text = (Kind.CONTROL, Kind.UNKNOWN), (Kind.USER_DEFINED,)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind in special)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (*special, *within_text)
        ]
    )


def _add_tokens(tokenizer: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """Adds the tokens in tokenizer_config.json, which counts where they differ, and in added_tokens.json.

    Raises ValueError when their ids leave gaps.
    """
    from tokenizers import AddedToken

    decoder = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    added = {
        i: AddedToken(token["content"], **{key: token[key] for key in FLAGS if key in token})
        for i, token in decoder.items()
    }
    names = {token.content: i for i, token in added.items()}
    for name, i in read_json(folder / "added_tokens.json").items():
        if names.get(name, int(i)) != int(i) or (int(i) in added and added[int(i)].content != name):
            logger.warning("%s is no token of id %s, as added_tokens.json has it: %s differs", name, i, CONFIG_FILE)
        elif int(i) not in added:
            added[int(i)] = AddedToken(name, normalized=False, special=True)
    for i, token in sorted(added.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise ValueError(f"the added token {token.content} should have id {i}, which the vocabulary does not allow")


def finished(tokenizer: Any, settings: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """Our tokenizer made from one of the library's.

    The token that begins a text becomes a rule of the definition, too, for other readers: transformers ignores
    add_bos_token where there is a tokenizer.json.
    """
    from tokenizers import processors

    begin = settings.get("bos_token") if settings.get("add_bos_token") else None
    begin_id = None if begin is None else tokenizer.token_to_id(begin)
    if begin_id is not None and tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", f"{begin}:1", "$B:1"], special_tokens=[(begin, begin_id)]
        )
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), settings)
