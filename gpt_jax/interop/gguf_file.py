"""GGUF files: metadata, and tensors, which are dequantised while they are read.

The header is read here and not by the package gguf, whose reader maps the file and makes an object of every token: 5
seconds and 170 MB for a vocabulary of 49,152, against a tenth of a second. The package dequantises the tensors.
Format: docs/gguf.md in the repository of ggml.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.interop.weights import check_no_pointer, cut_short, few, fill, unreadable

# The scalar types of metadata by number, as codes of both struct and NumPy. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# What a file may claim at most, so that one made of zeros, say, ends soon: far more than any model has.
MAX_COUNT = 1 << 16  # Tensors, and fields.
MAX_ELEMENTS = 1 << 22  # Of all arrays together: vocabulary, scores, merges.
MAX_NAME_BYTES = {"tensor": 64, "field": (1 << 16) - 1}  # As the format says.


@dataclass(frozen=True)
class _Tensor:
    type: int  # As ggml numbers its types.
    shape: tuple[int, ...]
    start: int  # Its first byte in the file.
    n_bytes: int


class GGUFFile:
    """The metadata (`fields`) and the tensors of a GGUF file, under llama.cpp's names and in its layout."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises UserError when the file is damaged, or has tensors of an unknown type."""
        self.path = path
        try:
            with path.open("rb") as file:
                reader = _Reader(file, path)
                n_tensors, n_fields = reader.counts()
                self.fields: dict[str, Any] = {}
                for _ in range(n_fields):
                    key = reader.name("field")
                    if key in self.fields:
                        raise reader.damaged(f"it has two fields {key!r:.80}")
                    self.fields[key] = reader.value(reader.scalar("I"))
                entries = [reader.tensor() for _ in range(n_tensors)]
                end = file.tell()
        except OSError as e:
            raise unreadable(path, e) from e
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise reader.damaged(f"its alignment is {alignment!r}")
        sizes = _block_sizes(path, {name: kind for name, _, kind, _ in entries})
        self._tensors: dict[str, _Tensor] = {}
        expected = 0  # Where the next tensor should begin, from the end of the header on.

        def aligned(n: int) -> int:
            return -(-n // alignment) * alignment

        for name, shape, kind, start in entries:
            block, block_bytes = sizes[kind]
            if name in self._tensors:
                raise reader.damaged(f"it has two tensors {name}")
            if not shape or shape[-1] % block:
                raise reader.damaged(f"tensor {name} of shape {shape} is not made of blocks of {block}")
            if start != expected:  # llama.cpp, too, refuses gaps and tensors that share bytes.
                raise reader.damaged(f"tensor {name} begins at byte {start} of the data, not {expected}")
            n_bytes = prod(shape) // block * block_bytes
            expected += aligned(n_bytes)
            self._tensors[name] = _Tensor(kind, shape, aligned(end) + start, n_bytes)
        if any(tensor.start + tensor.n_bytes > reader.size for tensor in self._tensors.values()):
            raise cut_short(path)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def fill(self, name: str, out: np.ndarray) -> None:
        """Fills `out`, a float32 view with the elements in the order of the file. Raises UserError; see `fill`."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.type)
        # As one row: each NumPy call handles all blocks at once, in half the time of row after row.
        fill(out, name, self.path, tensor.start, tensor.n_bytes, lambda source: dequantize(source[None], kind))


class _Reader:
    """Reads the values of the header one by one. Raises UserError when the file ends before."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.size = path.stat().st_size
        self._elements = 0  # Of the arrays read so far.

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self._path} is damaged or no GGUF file: {why}; download it again")

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and of fields, from the beginning of the file."""
        head = self._file.read(8)
        check_no_pointer(self._path, head)
        if head[:4] != b"GGUF":
            raise self.damaged("it does not begin with GGUF")
        version = int.from_bytes(head[4:], "little")
        if version not in (2, 3):
            raise UserError(f"{self._path} is of version {version} of GGUF, not 2 or 3, or for big-endian machines")
        counts = self.scalar("Q"), self.scalar("Q")
        self._need(24 * counts[0] + 13 * counts[1])  # Bytes, at least.
        if max(counts) > MAX_COUNT:
            raise self.damaged(f"it claims {counts[0]} tensors and {counts[1]} fields of metadata")
        return counts

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._read(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self._read(self.scalar("Q")).decode(errors="replace")

    def name(self, kind: str) -> str:
        """The name of a tensor or a field."""
        name = self.string()
        if len(name.encode()) > MAX_NAME_BYTES[kind]:
            raise self.damaged(f"the name of a {kind} is longer than {MAX_NAME_BYTES[kind]} bytes")
        return name

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            self._need(length * struct.calcsize(f"<{_SCALARS.get(item, 'Q' if item == _STRING else '0s')}"))
            self._elements += length
            if self._elements > MAX_ELEMENTS:
                raise self.damaged(f"its metadata has arrays of {self._elements} values")
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
                return np.frombuffer(self._read(length * dtype.itemsize), dtype).tolist()
            if item == _STRING:
                return [self.string() for _ in range(length)]
            kind = item
        raise self.damaged(f"its metadata has a value of type {kind}")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, and offset from the end of the header, of a tensor."""
        name = self.name("tensor")
        n_dims = self.scalar("I")
        if n_dims > 4:  # The limit of ggml.
            raise self.damaged(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def _read(self, n_bytes: int) -> bytes:
        self._need(n_bytes)
        return self._file.read(n_bytes)

    def _need(self, n_bytes: int) -> None:
        if n_bytes > self.size - self._file.tell():
            raise cut_short(self._path)


def _block_sizes(path: Path, kinds: dict[str, int]) -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block, by type. kinds: type by tensor. Raises UserError if one cannot be dequantised."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UserError("reading GGUF files needs the package gguf: pip install 'gpt-jax[interop]'") from None
    sizes = {}
    unknown: dict[int, str] = {}
    for kind in sorted(set(kinds.values())):
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            unknown[kind] = f"type {kind}"
            continue
        sizes[kind] = GGML_QUANT_SIZES[known]
        try:
            dequantize(np.zeros((1, sizes[kind][1]), np.uint8), known)
        except NotImplementedError:
            unknown[kind] = known.name
    if unknown:
        named = [f"{name} ({unknown[kind]})" for name, kind in kinds.items() if kind in unknown]
        raise UserError(
            f"{path} has tensors of types that cannot be dequantised: {few(named)}; take another quantisation of the "
            "model, such as Q8_0 or Q4_K_M"
        )
    return sizes
