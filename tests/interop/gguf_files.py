"""GGUF files: whole ones, written with the package gguf, and the bytes of their parts, for files that are not whole."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

# A Llama small enough to be written down, and what a file says about it.
METADATA: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 512,
    "llama.feed_forward_length": 1024,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
}
EMBEDDING = np.arange(512 * 3, dtype=np.float32).reshape(3, 512)


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any] = METADATA,
    architecture: str = "llama",
    types: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a file with the package gguf. types: of tensors that are given as bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(*parts: bytes | int, version: int = 3, tensors: int = 0, fields: int = 0) -> bytes:
    """The beginning of a file. Numbers in `parts` are lengths."""
    encoded = (part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(encoded)


def tensor_entry(name: bytes, shape: tuple[int, ...], kind: int = 0, start: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", kind, start)
