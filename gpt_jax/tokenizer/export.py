"""Tokenizers for transformers: AutoTokenizer loads the folder written here, and encodes as our tokenizer does."""

from pathlib import Path

from gpt_jax.storage.files import save_json
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import CONFIG_FILE, PARTS, TOKENS_FILE, HuggingFaceTokenizer
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

# WORD of gpt_jax.tokenizer.sentencepiece, as an alternation that never matches the empty string.
_WORD = r" *[^ \n]+\n*| +\n*|\n+"


def export_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into an existing folder.

    context_length: of the model, in tokens. transformers then encodes and decodes as `tokenizer` does, except that
    names of special tokens in a text become special tokens, by its default, and that a space before a text, which
    models of published SentencePiece vocabularies keep, is lost. SentencePiece has three more exceptions: in
    a run of byte tokens that is not valid UTF-8, every byte becomes U+FFFD; a unigram model may split a long run of one
    character in another, equally probable way; a model of characters encodes adjacent unknown characters, U+2581
    included, as one <unk>.
    """
    exported = as_hugging_face(tokenizer)
    exported.save(folder)
    # transformers would cut texts at tokens of these names that are ordinary text.
    parts = {
        part: name
        for part, name in exported.parts.items()
        if name in {*exported.special_tokens, exported.parts["eos_token"]}
    }
    config = {key: value for key, value in exported.config().items() if key in parts or key not in PARTS}
    save_json(folder / CONFIG_FILE, {**config, "model_max_length": context_length})
    save_json(folder / TOKENS_FILE, parts)


def as_hugging_face(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer in terms of `tokenizer.json`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        exported = _of_bytes(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        exported = _of_sentencepiece(tokenizer)
    else:
        raise TypeError(f"a {type(tokenizer).__name__}")
    return exported if tokenizer.chat_template is None else exported.with_chat_template(tokenizer.chat_template)


def _of_bytes(tokenizer: ByteTokenizer) -> HuggingFaceTokenizer:
    """Byte-level BPE without merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    # The format writes bytes as visible characters: printable ones of Latin-1 stand for themselves.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    library = Library(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, normalized=False) for name in tokenizer.special_tokens])
    return finished(library, {"eos_token": END_OF_TEXT})


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    """Pieces with spaces in place of U+2581, so that U+2581 in a text is a rare character, spelled in bytes."""
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
