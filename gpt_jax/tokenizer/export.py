"""Tokenizers for transformers: a folder from which AutoTokenizer makes one that encodes as ours does."""

from pathlib import Path

from gpt_jax.files import save_json
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import CONFIG_FILE, HuggingFaceTokenizer
from gpt_jax.tokenizer.published import (
    Kind,
    bpe_model,
    finished,
    sentencepiece_pieces,
    sentencepiece_proto,
    unigram_model,
)
from gpt_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

# WORD of gpt_jax.tokenizer.sentencepiece, as an alternation that matches nothing empty.
_WORD = r" *[^ \n]+\n*| +\n*|\n+"


def export_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into an existing folder.

    context_length: of the model, in tokens. What transformers makes of them encodes and decodes as `tokenizer` does,
    but for this: names of special tokens in a text become special, as transformers has it by default. And for
    SentencePiece: where byte tokens do not add up to characters, all bytes of the run become U+FFFD, one by one; a
    unigram model may cut a long run of one character in another way that is as probable; with a model of characters,
    neighbours that are unknown become one <unk>, also where one of them is U+2581.
    """
    exported = as_hugging_face(tokenizer)
    exported.save(folder)
    save_json(folder / CONFIG_FILE, {**exported.config(), "model_max_length": context_length})
    save_json(folder / "special_tokens_map.json", exported.parts)


def as_hugging_face(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer in terms of `tokenizer.json`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    raise TypeError(f"a {type(tokenizer).__name__}")


def _of_bytes(tokenizer: ByteTokenizer) -> HuggingFaceTokenizer:
    """Byte-level BPE in which nothing is merged."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    # The format writes bytes as characters that can be seen: printable ones of Latin-1 stand for themselves.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    library = Library(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, normalized=False) for name in tokenizer.special_tokens])
    return finished(library, {"eos_token": END_OF_TEXT})


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    """Pieces with spaces in them, in place of U+2581, so that a real U+2581 is a rare character, spelled in bytes."""
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Library

    model = sentencepiece_proto(tokenizer.model)
    pieces = [piece._replace(text=piece.text.replace("▁", " ")) for piece in sentencepiece_pieces(model)]
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    library = Library(unigram_model(pieces) if unigram else bpe_model(pieces))  # A model of characters merges nothing.
    library.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    unknown = [piece.text for piece in pieces if piece.kind == Kind.UNKNOWN]
    replaced = [decoders.Replace(Regex(f"^{name}$"), "\ufffd") for name in unknown]
    library.decoder = decoders.Sequence([*replaced, decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(name, normalized=False) for name in tokenizer.special_tokens])
    return finished(library, {"eos_token": END_OF_TEXT})
