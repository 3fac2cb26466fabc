"""The vocabularies and texts with which llama.cpp tests its tokenizers, from the sources of the package
llama-cpp-python (68 MB, MIT licence). The texts alone are beside the tests."""

import fcntl
import hashlib
import os
import tarfile
import urllib.request
from pathlib import Path

import pytest

URL = (
    "https://files.pythonhosted.org/packages/de/6d/4a20e676bdf7d9d3523be3a081bf327af958f9bdfe2a564f5cf485faeaec/"
    "llama_cpp_python-0.3.9.tar.gz"
)
SHA256 = "a3a985f558385e2f5de5b663f4e9b0817506d6af98122450142cd98e79216370"
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
    LLAMA_CPP_VOCABULARIES names, or downloaded once and kept in pytest's cache.

    Skips the test where the package cannot be had, as without a network.
    """
    if given := os.environ.get("LLAMA_CPP_VOCABULARIES"):
        return Path(given)
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir("llama_cpp")
    with (folder / "lock").open("w") as lock:  # Of all test processes, one downloads, and the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            _download(folder)
    return folder


def _download(folder: Path) -> None:
    archive = folder / "sdist.tar.gz"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            archive.write_bytes(response.read())
    except OSError as e:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip  # CI must not pass without the vocabularies.
        give_up(f"{URL} cannot be downloaded: {e}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    names = {f"{FOLDER}ggml-vocab-{name}.gguf{kind}" for name in VOCABULARIES for kind in ("", ".inp", ".out")}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in names:
                member.name = Path(member.name).name
                tar.extract(member, folder, filter="data")
    archive.unlink()
    (folder / "complete").touch()
