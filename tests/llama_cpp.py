"""The vocabularies and texts with which llama.cpp tests its tokenizers, from the sources of the package
llama-cpp-python (68 MB, MIT licence). The texts alone are beside the tests."""

import os
import tarfile
from pathlib import Path

import pytest

from tests.packaged import downloaded

PACKAGE = "llama-cpp-python==0.3.9"
FOLDER = "llama_cpp_python-0.3.9/vendor/llama.cpp/models/"
# Those of kinds that `gpt_jax.tokenizer.published` names.
VOCABULARIES = ("command-r", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "refact", "starcoder")


def texts(content: str) -> list[str]:
    """The texts in a file .inp, 46 of them; each is followed by a line of its own."""
    return content.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")


TEXTS = texts((Path(__file__).parent / "tokenizer" / "llama_cpp_texts.inp").read_bytes().decode())


@pytest.fixture(scope="session")
def llama_cpp_vocabularies(pytestconfig: pytest.Config) -> Path:
    """A folder of llama.cpp's ggml-vocab-*.gguf with their .inp and .out: the one that the variable
    LLAMA_CPP_VOCABULARIES names, or `downloaded`."""
    if given := os.environ.get("LLAMA_CPP_VOCABULARIES"):
        return Path(given)
    return downloaded(pytestconfig, "llama_cpp", PACKAGE, _unpack)


def _unpack(archive: Path, folder: Path) -> None:
    names = {f"{FOLDER}ggml-vocab-{name}.gguf{kind}" for name in VOCABULARIES for kind in ("", ".inp", ".out")}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in names:
                member.name = Path(member.name).name
                tar.extract(member, folder, filter="data")
