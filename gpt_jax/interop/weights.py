"""The tensors of published models, read from and written to safetensors files about a megabyte at a time.

Such a file is the length of its header in 8 bytes, the header (JSON: type, shape and place of each tensor) and the
tensors' bytes without gaps. Tensors pass through a small buffer, so that memory never holds another copy of them.
Format: the README of the safetensors library, section "Format".
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing, save_json

SAFETENSORS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The types of buffers, such as a causal mask, which files may have beside the parameters.
WHOLE_NUMBER_DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
WRITTEN_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CONFIG_DTYPES = WRITTEN_DTYPES | {"float64": "F64"}

MAX_HEADER_BYTES = 100_000_000  # The limit of the safetensors library; a config.json or an index is no longer, either.
MAX_DIMS = 32  # Of a tensor; no model has more than a few.
# Numbers that are read, converted or written at one time: a megabyte of float32, which stays in a core's cache.
SLICE_ELEMENTS = 1 << 18


class Weights(Protocol):
    """The tensors of a published model, named and laid out as its implementation in transformers has them."""

    @property
    def where(self) -> str:
        """The folder or file, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""

    @property
    def types(self) -> frozenset[str]:
        """The types of the tensors of real numbers, as config.json names them; none if that does not matter."""

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor as float32, read into `out` (of its shape, with any strides) where that is given.

        Raises UserError when the file cannot be read, or the tensor is of whole numbers, or has some that are not
        finite.
        """


class SafetensorsWeights:
    """The tensors of a folder: `model.safetensors`, or shards with an index, or a single *.safetensors."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises UserError when a file is missing, damaged, or of an unsupported type."""
        self.where = str(folder)
        self._tensors: dict[str, _Tensor] = {}
        paths, index, self.notes = _files(folder)
        for path in paths:
            tensors = _read_header(path)
            if twice := tensors.keys() & self._tensors:
                other = self._tensors[min(twice)].path.name
                raise UserError(f"{path} has tensors that {other} has, too: {few(sorted(twice))}; remove one of them")
            self._tensors |= tensors
        lacking = [
            f"{name} in {file}"
            for name, file in index.items()
            if name not in self._tensors or self._tensors[name].path.name != file
        ]
        if lacking:
            raise UserError(f"{folder / INDEX_FILE} lists tensors that are not there: {few(lacking)}; download again")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        stored = {tensor.dtype for tensor in self._tensors.values()}
        self.types = frozenset(name for name, dtype in CONFIG_DTYPES.items() if dtype in stored)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """See Weights."""
        tensor = self._tensors[name]
        dtype = FLOAT_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UserError(f"tensor {name} in {tensor.path} is of whole numbers ({tensor.dtype}), so no weights")
        if out is None:
            out = np.empty(tensor.shape, np.float32)
        assert out.shape == tensor.shape
        fill(out, name, tensor.path, tensor.start, tensor.n_bytes, lambda source: source.view(dtype))
        return out


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors as save_pretrained in transformers does: one file, or shards with an index.

    shapes: by name, in the order of the files. read: gives a tensor, float32 of that shape, and is called when the
    tensor is written. Numbers are rounded to nearest even. Raises UserError when one is not finite, or
    too large for the type.
    """
    n_bytes = {name: prod(shape) * FLOAT_DTYPES[WRITTEN_DTYPES[dtype]].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(n_bytes[other] for other in shards[-1]) + n_bytes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        _write(folder / SAFETENSORS_FILE, shapes, read, dtype)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        path = folder / f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(path, {name: shapes[name] for name in names}, read, dtype)
        weight_map |= dict.fromkeys(names, path.name)
    sizes = {"total_parameters": sum(map(prod, shapes.values())), "total_size": sum(n_bytes.values())}
    save_json(folder / INDEX_FILE, {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})


def fill(
    out: np.ndarray, name: str, path: Path, start: int, n_bytes: int, decode: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Fills `out` with the tensor `name`, the `n_bytes` of a file from byte `start` on, in slices of the first axis.

    out: float32, with any strides; the file has its elements in this order. decode: turns bytes (uint8) into numbers.
    Raises UserError when the file cannot be read or is too short, or a number is not finite.
    """
    if not out.size:
        return
    rows = _rows(out)
    row_bytes = n_bytes // len(rows)
    step = max(1, SLICE_ELEMENTS // rows[0].size)
    buffer = np.empty(min(step, len(rows)) * row_bytes, np.uint8)
    try:
        with path.open("rb") as file, np.errstate(all="ignore"):
            file.seek(start)
            for i in range(0, len(rows), step):
                part = rows[i : i + step]
                source = buffer[: len(part) * row_bytes]
                if file.readinto(source.data) != len(source):
                    raise cut_short(path)
                numbers = decode(source).reshape(part.shape)
                if not part.flags.c_contiguous:  # Then it pays to convert first.
                    numbers = np.asarray(numbers, np.float32)
                part[...] = numbers
                # While they are in the cache: a second pass over all weights would take longer.
                if not all_finite(part if part.flags.c_contiguous else numbers):
                    raise UserError(
                        f"tensor {name} in {path} has numbers that are not finite (nan or infinity), and so would "
                        "all that the model computes; download it again, or take another copy of the model"
                    )
    except OSError as e:
        raise unreadable(path, e) from e


def all_finite(numbers: np.ndarray) -> bool:
    """True when no number is nan or infinite."""
    return bool(np.isfinite(np.asarray(numbers, np.float32)).all())  # NumPy is slow at this for 16 bits.


def few(names: Iterable[str], most: int = 20) -> str:
    """The names, joined for a message of one line: all, or the first `most` and the number of the others."""
    names = [name if len(name) <= 200 else f"{name[:200]}..." for name in names]
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when there is none."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, which no file of settings has; copy it again")
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from e
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; copy or download it again")
    return value


def cut_short(path: Path) -> UserError:
    """The error of a file that ends before it should."""
    return UserError(f"{path} is cut short; copy or download it again")


def unreadable(path: Path, error: OSError) -> UserError:
    """The error of a file or folder that cannot be read."""
    return UserError(f"{path} cannot be read ({error.strerror})")


def check_no_pointer(path: Path, head: bytes) -> None:
    """Raises UserError when `head`, the first 8 bytes, is from a pointer to a file in Git LFS."""
    if head == b"version ":
        raise UserError(f"{path} only points to a file in Git LFS; fetch that with git lfs pull")


@dataclass(frozen=True)
class _Tensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # Its first byte in the file.
    n_bytes: int


def _rows(array: np.ndarray) -> np.ndarray:
    """A view with at least two axes; a scalar or vector becomes one row."""
    while array.ndim < 2:
        array = array[None]
    return array


def _files(folder: Path) -> tuple[list[Path], dict[str, str], tuple[str, ...]]:
    """The safetensors files of a folder, the file of each tensor, if there is an index, and lines for the user."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as e:
        raise unreadable(folder, e) from e
    found = [name for name in names if name.endswith(".safetensors")]
    if SAFETENSORS_FILE in found:
        note = f"{SAFETENSORS_FILE} counts, not the files that {INDEX_FILE} lists"  # As in transformers.
        return [folder / SAFETENSORS_FILE], {}, (note,) if INDEX_FILE in names else ()
    if INDEX_FILE in names:
        index = load_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map from tensors to files; download it again")
        shards = sorted(set(index.values()))
        if missing := [shard for shard in shards if shard not in names]:
            raise UserError(f"{folder} lacks files that {INDEX_FILE} lists: {few(missing)}; download them")
        return [folder / shard for shard in shards], index, ()
    if len(found) > 1:
        raise UserError(f"{folder} has {few(found)}, but no {INDEX_FILE} that says how they belong together")
    if found:
        return [folder / found[0]], {}, ()
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        raise UserError(
            f"{folder} has its weights only in {few(pickled)}, a format that can run programs and is not opened; "
            "convert them to safetensors (save_pretrained of transformers writes it)"
        )
    raise UserError(f"there are no weights in {folder}: no *.safetensors file")


def _read_header(path: Path) -> dict[str, _Tensor]:
    """The tensors of one file. Raises UserError unless header and file agree to the byte."""
    damaged = f"{path} is damaged or no safetensors file"
    try:
        if not path.is_file() and not path.is_dir():  # Opening a pipe would wait for its writer for ever.
            raise UserError(f"{path} is no file; copy or download it again")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            check_no_pointer(path, head)
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > MAX_HEADER_BYTES:
                raise UserError(f"{damaged}: it begins with no header; download it again")
            header = file.read(header_bytes)
    except OSError as e:
        raise unreadable(path, e) from e
    if len(header) < header_bytes:
        raise cut_short(path)
    try:
        if not header.startswith(b"{"):  # As the format demands, so that it is no UTF-16, either.
            raise ValueError
        entries = json.loads(header.decode())
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            [start, end], shape = entry["data_offsets"], tuple(entry["shape"])
            # The library reads 64 bits, too. More, or thousands of dimensions, would take for ever to multiply.
            if len(shape) > MAX_DIMS or any(type(n) is not int or abs(n) >= 2**63 for n in (start, end, *shape)):
                raise ValueError
            tensors[name] = _Tensor(path, str(entry["dtype"]), shape, 8 + header_bytes + start, end - start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{damaged}: its header is no table of tensors in JSON; download it again") from None
    itemsizes = WHOLE_NUMBER_DTYPES | {dtype: numbers.itemsize for dtype, numbers in FLOAT_DTYPES.items()}
    if unsupported := [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in itemsizes]:
        raise UserError(
            f"{path} has tensors of types that are not supported: {few(unsupported)}; take the model in float32, "
            "float16 or bfloat16"
        )
    end = 8 + header_bytes
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        expected = prod(tensor.shape) * itemsizes[tensor.dtype]
        if min(tensor.shape, default=0) < 0 or tensor.n_bytes != expected:
            raise UserError(f"{damaged}: tensor {name} has {tensor.n_bytes} bytes, where its shape needs {expected}")
        if tensor.start != end:
            raise UserError(f"{damaged}: tensor {name} does not begin where the one before it ends")
        end += tensor.n_bytes
    if end > size:
        raise cut_short(path)
    if end < size:
        raise UserError(f"{damaged}: {size - end} bytes follow the last tensor")
    return tensors


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], dtype: str) -> None:
    """Writes one file."""
    numbers = FLOAT_DTYPES[WRITTEN_DTYPES[dtype]]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * numbers.itemsize
        header[name] = {"dtype": WRITTEN_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # Aligns the numbers for programs that map the file to memory.
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape
            if not tensor.size:
                continue
            rows = _rows(tensor)
            step = max(1, SLICE_ELEMENTS // rows[0].size)
            for i in range(0, len(rows), step):
                part = rows[i : i + step]
                with np.errstate(over="ignore"):
                    rounded = np.ascontiguousarray(part, numbers)
                if not all_finite(rounded):
                    if not all_finite(part):
                        raise UserError(
                            f"tensor {name} has numbers that are not finite (nan or infinity); no model "
                            "could be computed from them"
                        )
                    raise UserError(f"tensor {name} has numbers too large for {dtype}; export in float32")
                file.write(rounded.view(np.uint8).data)
