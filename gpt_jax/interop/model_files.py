"""The files of a published model, a folder from the hub or a GGUF file, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.interop.gguf import GGUFWeights
from gpt_jax.interop.weights import SafetensorsWeights, Weights, load_json
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.published import gguf_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The parts of a published model, in the terms of its implementation in transformers."""

    where: str  # The folder or file, for messages.
    config: dict[str, Any]  # As in config.json.
    weights: Weights
    tokenizer: Callable[[], Tokenizer]  # Loads it.
    notes: tuple[str, ...] = ()  # Lines for the user on what the files say in two ways.


def open_model(path: Path) -> ModelFiles:
    """The model in a folder, or in a .gguf file. Only names and shapes of the weights are read.

    Raises UserError naming the file, and the tensor or field, that is missing, damaged or of an unknown kind.
    """
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is only the weights of a model; name the folder that it is in, with its {CONFIG_FILE}")
    if path.is_file():
        file = GGUFWeights(path)
        return ModelFiles(str(path), file.config, file, lambda: gguf_tokenizer(file.fields), file.notes)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} is no folder of a published model: it has no {CONFIG_FILE} (a GGUF file: name the file)"
        )
    config = load_json(path / CONFIG_FILE)
    if "model_type" not in config:
        raise UserError(f"{path / CONFIG_FILE} has no model_type, so it is not of a published model (a run: --run)")
    if config.get("quantization_config") is not None:
        raise UserError(f"{path} is quantised; take the model in float32, float16 or bfloat16, or as a GGUF file")
    weights = SafetensorsWeights(path)
    return ModelFiles(str(path), config, weights, lambda: load_tokenizer(path), weights.notes)
