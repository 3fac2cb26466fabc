"""A folder or a GGUF file gives all parts of a model, or a reason in one line."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.interop.model_files import open_model
from gpt_jax.interop.weights import write_safetensors
from gpt_jax.tokenizer.bytes import ByteTokenizer


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    write_safetensors(tmp_path, {"x": (2,)}, lambda _: np.ones(2, np.float32))
    files = open_model(tmp_path)
    assert files.where == str(tmp_path)
    assert files.config == {"model_type": "gpt2", "n_layer": 3}
    assert files.weights.shapes == {"x": (2,)}
    ByteTokenizer().save(tmp_path)
    files = open_model(tmp_path)
    assert files.tokenizer().encode("é") == [195, 169]


@pytest.mark.slow
def test_a_gguf_file(smollm2_gguf: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    files = open_model(smollm2_gguf)
    assert files.where == str(smollm2_gguf)
    assert files.config["model_type"] == "llama"
    assert len(files.weights.shapes) == 272
    tokenizer = files.tokenizer()
    assert tokenizer.vocab_size == files.config["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Numbers: 12345, 语言")) == "Numbers: 12345, 语言"


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: None, "is no folder of a published model: it has no config.json"),
    "run": (lambda f: (f / "config.json").write_text("{}"), "has no model_type, so it is not of a published model"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json holds no JSON object"),
    "quantised": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}'),
        "is quantised; take the model in float32, float16 or bfloat16, or as a GGUF file",
    ),
    "no weights": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "there are no weights in",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model(tmp_path: Path, case: str) -> None:
    make, message = FOLDERS[case]
    make(tmp_path)
    with pytest.raises(UserError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        open_model(tmp_path)


def test_weights_without_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is only the weights of a model; name the folder"):
        open_model(tmp_path / "model.safetensors")
