"""Files that keep one array between runs: with what it belongs to, and a checksum. A file that is not of that, or is
damaged, is as good as none."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.storage.files import replacing


def save_array(file: Path, key: Any, facts: Any, values: np.ndarray) -> None:
    """Writes a line of JSON, padded to a multiple of 8 bytes; then a flat array of an element size that divides 8,
    little endian, padded likewise; then the CRC-32 of all before it in 8 bytes. Raises OSError."""
    header = json.dumps({"key": key, "facts": facts, "dtype": values.dtype.newbyteorder("<").str, "size": values.size})
    line = f"{header}{' ' * (-(len(header) + 1) % 8)}\n".encode()
    content = values.astype(values.dtype.newbyteorder("<")).tobytes()
    content += bytes(-len(content) % 8)
    with replacing(file) as temporary, temporary.open("wb") as f:
        f.write(line)
        f.write(content)
        f.write(zlib.crc32(content, zlib.crc32(line)).to_bytes(8, "little"))


def load_array(file: Path, key: Any) -> tuple[Any, np.ndarray] | None:
    """The facts and the array in a file, memory-mapped; None when there is none of this key, or it is damaged."""
    try:
        with file.open("rb") as f:
            line = f.readline(1 << 16)
        content = np.memmap(file, np.uint8, "r", offset=len(line)).view(np.ndarray)
    except (OSError, ValueError):
        return None
    checksum = content[-8:].tobytes()
    if zlib.crc32(content[:-8].data, zlib.crc32(line)) != int.from_bytes(checksum, "little") or len(checksum) < 8:
        return None
    header = json.loads(line)
    if header["key"] != json.loads(json.dumps(key)):
        return None
    dtype = np.dtype(header["dtype"])
    return header["facts"], content[: header["size"] * dtype.itemsize].view(dtype)
