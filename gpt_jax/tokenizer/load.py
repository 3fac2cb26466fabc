"""Loading a tokenizer of any kind from a file or folder."""

import json
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import from_tokenizer_json
from gpt_jax.tokenizer.published import from_sentencepiece, from_vocabulary
from gpt_jax.tokenizer.sentencepiece import ForeignModelError, SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import (
    BYTE_LEVEL_FILE,
    JSON_FILE,
    SENTENCEPIECE_FILE,
    TEMPLATE_FILE,
    WORDPIECE_FILE,
    Tokenizer,
)

# Files that identify a tokenizer. The first of them that a folder has counts.
FILES = (JSON_FILE, SENTENCEPIECE_FILE, BYTE_LEVEL_FILE, WORDPIECE_FILE)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one of FILES, made here or published elsewhere.

    Files beside it that belong to it, such as `merges.txt` and `tokenizer_config.json`, are read, too. Raises UserError
    when it is missing, damaged, of an unknown kind, or needs a package that is not installed.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"there is no tokenizer in {path}: none of {', '.join(FILES)}")
        path = found[0]
    try:
        tokenizer = _load(path, path.read_bytes())
        if isinstance(tokenizer, ByteTokenizer | SentencePieceTokenizer) and (path.parent / TEMPLATE_FILE).is_file():
            return tokenizer.with_chat_template((path.parent / TEMPLATE_FILE).read_text(encoding="utf-8"))
        return tokenizer
    except FileNotFoundError as e:
        missing = f", which belongs to {path.name}" if e.filename != str(path) else ""
        raise UserError(f"there is no tokenizer {e.filename}{missing}") from None
    except OSError as e:
        raise UserError(f"{e.filename or path} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path} cannot be used as a tokenizer: {' '.join(str(e).split())}") from e
    except (TypeError, LookupError, AttributeError, RecursionError) as e:  # A value of the wrong type.
        raise UserError(
            f"{path} cannot be used as a tokenizer: something in it, or in a file beside it, is of another type than "
            f"it should be ({type(e).__name__}: {e})"
        ) from e


def _load(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer that the content of a file defines. Raises ValueError when it is damaged or unknown."""
    if path.name in (BYTE_LEVEL_FILE, WORDPIECE_FILE):
        return from_vocabulary(path)
    if path.suffix == ".json":
        return _from_json(path, content)
    try:
        return SentencePieceTokenizer(content)
    except ForeignModelError:
        return from_sentencepiece(path)


def _from_json(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer in a JSON object: ours if it has a "type", Hugging Face's if it has a "model"."""
    definition = json.loads(content)
    fields = definition if isinstance(definition, dict) else {}
    if fields.get("type") == "bytes":
        return ByteTokenizer.from_definition(fields)
    if "model" in fields:
        return from_tokenizer_json(content, path.parent)
    raise ValueError('it is neither a JSON object of "type": "bytes" nor one with a "model", as Hugging Face has')
