"""The one way from a file or folder to a tokenizer, whoever made it."""

import json
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer, read_settings
from gpt_jax.tokenizer.published import from_sentencepiece, from_vocabulary
from gpt_jax.tokenizer.sentencepiece import ForeignModelError, SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import BYTE_LEVEL_FILE, JSON_FILE, SENTENCEPIECE_FILE, WORDPIECE_FILE, Tokenizer

# The files that a tokenizer is known by; of several in a folder, the first one counts.
FILES = (JSON_FILE, SENTENCEPIECE_FILE, BYTE_LEVEL_FILE, WORDPIECE_FILE)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one of FILES, made here or published elsewhere.

    What is beside the file is read too where it belongs to it, such as `merges.txt` and `tokenizer_config.json`.
    Raises UserError when there is none, when it is damaged or of a kind that is not known, and when it needs a package
    that is not installed.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"there is no tokenizer in {path}: none of {', '.join(FILES)}")
        path = found[0]
    try:
        return _load(path, path.read_bytes())
    except FileNotFoundError as e:
        missing = f", which belongs to {path.name}" if e.filename != str(path) else ""
        raise UserError(f"there is no tokenizer {e.filename}{missing}") from None
    except OSError as e:
        raise UserError(f"{e.filename or path} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path} cannot be used as a tokenizer: {e}") from e
    except (TypeError, LookupError, AttributeError, RecursionError) as e:  # Something of another type somewhere.
        raise UserError(
            f"{path} cannot be used as a tokenizer: something in it, or in a file beside it, is of another type than "
            f"it should be ({type(e).__name__}: {e})"
        ) from e


def _load(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer that the content of a file defines. Raises ValueError where it is damaged or not known."""
    if path.name in (BYTE_LEVEL_FILE, WORDPIECE_FILE):
        return from_vocabulary(path)
    if path.suffix == ".json":
        return _from_json(path, content)
    try:
        return SentencePieceTokenizer(content)
    except ForeignModelError:
        return from_sentencepiece(path)


def _from_json(path: Path, content: bytes) -> Tokenizer:
    """The tokenizer that a JSON object defines: ours by its "type", Hugging Face's by its "model"."""
    definition = json.loads(content)
    keys = definition if isinstance(definition, dict) else {}
    if keys.get("type") == "bytes":
        return ByteTokenizer.from_definition(keys)
    if "model" in keys:
        return HuggingFaceTokenizer(content, read_settings(path.parent))
    raise ValueError('it is neither a JSON object of "type": "bytes" nor one with a "model", as Hugging Face has')
