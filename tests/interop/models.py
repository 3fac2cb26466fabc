"""Small models of random weights in the form in which models are published, made without torch."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families import family_for
from gpt_jax.interop.load import tensor_shapes
from gpt_jax.interop.save import generation_settings, model_settings, parts_of, write_model
from gpt_jax.interop.weights import write_safetensors
from gpt_jax.model.gpt import Params
from gpt_jax.storage.files import save_json
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.export import export_tokenizer
from tests import tiny
from tests.tiny import random_params

LLAMA = dataclasses.replace(tiny.LLAMA, attention="xla")


def publish(folder: Path, config: ModelConfig = LLAMA) -> Params:
    """Writes a folder with a model whose tokens are bytes; returns the parameters."""
    family = family_for(config)
    assert family is not None
    params, tokenizer = random_params(config), ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, family, config, parts_of(params), "float32")
    save_json(folder / "config.json", model_settings(family, config, tokenizer, "float32"))
    save_json(folder / "generation_config.json", generation_settings(tokenizer))
    export_tokenizer(tokenizer, folder, config.context_length)
    return params


def publish_zeros(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Writes tensors of zeros, without compiling anything; returns what belongs into their config.json."""
    family = family_for(config)
    assert family is not None
    folder.mkdir(parents=True)
    shapes = tensor_shapes(family, config)
    write_safetensors(folder, shapes, lambda name: np.zeros(shapes[name], np.float32))
    return model_settings(family, config, ByteTokenizer(), "float32")
