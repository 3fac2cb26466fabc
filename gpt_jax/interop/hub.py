"""Models by name: an existing folder or file, or else a repository on the Hugging Face hub."""

import logging
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.system import user_path

# Weights in one format, configuration, tokenizer and chat template; no subfolders, which are for other programs.
ALLOW_PATTERNS = ["model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
IGNORE_PATTERNS = ["*/*"]
TIMEOUT = 10.0  # Seconds for the hub's first answer.

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_model(name: str) -> Path:
    """The folder or .gguf file called `name`, or else the hub's repository of that name, downloaded if need be.

    Raises UserError when there is neither, or the hub cannot be reached or denies access.
    """
    path = user_path(name)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(name) or name.startswith((".", "~")) or name.endswith((".gguf", ".safetensors")):
        raise UserError(f"there is no folder or file {name}")
    folder = _download(name)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} on the hub has no model*.safetensors; a .gguf file there can be downloaded and named")
    return folder


def _download(name: str) -> Path:
    """The folder in the hub's cache with the newest files of a repository. Raises UserError."""
    try:
        from huggingface_hub import HfApi, constants, errors, snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {name}; to look it up on the hub needs the package huggingface_hub: "
            "pip install 'gpt-jax[interop]'"
        ) from None
    hub = constants.ENDPOINT
    download = partial(snapshot_download, name, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # It warns of a retry a dozen times.
    try:
        try:
            HfApi().repo_info(name, revision="main", timeout=TIMEOUT)  # The download asks the same, without a limit.
        except Exception:  # An earlier download has to do.
            with suppress(errors.LocalEntryNotFoundError):
                return Path(download(local_files_only=True))
            raise
        return Path(download())
    except errors.GatedRepoError:
        why = f"{name} is open only to those who accept its terms at {hub}/{name}; then set HF_TOKEN"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = f"there is no folder {name}, and no such model at {hub} (a private one needs HF_TOKEN)"
    except Exception as e:  # The HTTP library, and so its errors, depends on the version of huggingface_hub.
        why = f"there is no folder {name}, and it cannot be downloaded from {hub} ({_reason(e)})"
    raise UserError(why)


def _reason(error: BaseException) -> str:
    """The first line of the original cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
