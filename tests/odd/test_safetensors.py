"""What strangers write into safetensors files is read as the library reads it, or refused in one line, at once."""

import contextlib
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.interop.weights import INDEX_FILE, SAFETENSORS_FILE, SafetensorsWeights
from tests.memory import at_most

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
DATA = A.tobytes() + B.tobytes()
ENTRY_A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ENTRY_B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}
HEADER: dict[str, Any] = {"__metadata__": {"format": "pt"}, "a": ENTRY_A, "b": ENTRY_B}


def file_of(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file with this header, an object or bytes, that claims `length` bytes for it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def with_a(**changes: Any) -> bytes:
    """A file in which the entry of tensor a has other values."""
    return file_of(HEADER | {"a": ENTRY_A | changes})


NO_TABLE = "its header is no table of tensors in JSON"
NO_HEADER = "it begins with no header"
TEXT = json.dumps(HEADER).encode()

REFUSED: dict[str, tuple[bytes, str]] = {
    "a header of 2**64 - 1 bytes": (file_of(HEADER, length=2**64 - 1), NO_HEADER),
    "a header of 100,000,001 bytes": (file_of(HEADER, length=100_000_001), NO_HEADER),
    "a header longer than the file": (file_of(HEADER, length=99_999_999), "is cut short"),
    "a header of no bytes": (file_of(b""), NO_TABLE),
    "a header of spaces": (file_of(b"    "), NO_TABLE),
    "seven bytes": (b"\x02\0\0\0\0\0\0", NO_HEADER),
    "a header in UTF-16": (file_of(TEXT.decode().encode("utf-16")), NO_TABLE),
    "a number of 5,000 digits": (file_of(TEXT.replace(b"[0, 24]", b"[0, " + b"9" * 5000 + b"]")), NO_TABLE),
    "a space before the header": (file_of(b" " + TEXT), NO_TABLE),
    "nan for an offset": (with_a(data_offsets=[0, float("nan")]), NO_TABLE),
    "an offset with a fraction": (with_a(data_offsets=[0, 24.5]), NO_TABLE),
    "an offset that is whole, with a point": (with_a(data_offsets=[0, 24.0]), NO_TABLE),
    "an offset in quotes": (with_a(data_offsets=[0, "24"]), NO_TABLE),
    "an offset that is true": (with_a(shape=[], data_offsets=[False, True]), NO_TABLE),
    "an offset of 2**63": (with_a(data_offsets=[2**63, 2**63 + 24]), NO_TABLE),
    "an offset of 2**62": (with_a(data_offsets=[2**62, 2**62 + 24]), "does not begin where the one before it ends"),
    "one offset": (with_a(data_offsets=[24]), NO_TABLE),
    "offsets that are an object": (with_a(data_offsets={"0": 0, "24": 24}), NO_TABLE),
    "the end before the start": (with_a(data_offsets=[24, 0]), "tensor a has -24 bytes, where its shape needs 24"),
    "a dimension that is null": (with_a(shape=[2, None]), NO_TABLE),
    "a dimension with a point": (with_a(shape=[2.0, 3]), NO_TABLE),
    "a dimension that is true": (with_a(shape=[True, 6]), NO_TABLE),
    "a dimension of 2**64": (with_a(shape=[2**64, 3]), NO_TABLE),
    "dimensions whose product is 6 in 64 bits": (
        with_a(shape=[2**62, 4, 6]),
        "tensor a has 24 bytes, where its shape needs 442721857769029238784",
    ),
    "a negative dimension and none": (with_a(shape=[-1, 0], data_offsets=[0, 0]), "where its shape needs 0"),
    "a shape that is a number": (with_a(shape=6), NO_TABLE),
    "a shape that is text": (with_a(shape="23"), NO_TABLE),
    "a thousand dimensions": (with_a(shape=[2, 3] + [1] * 1000), NO_TABLE),
    "no type": (file_of(HEADER | {"a": {"shape": [2, 3], "data_offsets": [0, 24]}}), NO_TABLE),
    "a type that is null": (with_a(dtype=None), "types that are not supported: a (None)"),
    "a type in small letters": (with_a(dtype="f32"), "types that are not supported: a (f32)"),
    "a type of 8 bits": (with_a(dtype="F8_E5M2", shape=[24]), "types that are not supported: a (F8_E5M2)"),
    "a type that is long": (with_a(dtype="x" * 10**6), "types that are not supported: a (xxx"),
    "an entry that is null": (file_of(HEADER | {"a": None}), NO_TABLE),
    "an entry that is a list": (file_of(HEADER | {"a": ["F32", [2, 3], [0, 24]]}), NO_TABLE),
    "no entries, and data": (file_of({}), "32 bytes follow the last tensor"),
    "the first bytes are of no tensor": (file_of({"b": ENTRY_B}), "tensor b does not begin where the one before it"),
    "two names for the same bytes": (
        file_of(HEADER | {"c": ENTRY_A}),
        "tensor c does not begin where the one before it ends",
    ),
    "a part of another tensor": (
        file_of(HEADER | {"b": {"dtype": "F16", "shape": [4], "data_offsets": [20, 28]}}),
        "tensor b does not begin where the one before it ends",
    ),
    "a name twice": (
        file_of(TEXT[:-1] + b', "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'),
        "tensor b does",
    ),
    "an empty tensor beyond the end": (
        file_of(HEADER | {"c": {"dtype": "F32", "shape": [0], "data_offsets": [99, 99]}}),
        "tensor c does not begin where the one before it ends",
    ),
    "two headers": (file_of(TEXT + TEXT), NO_TABLE),
}


def refusal(folder: Path) -> str:
    """The one line that opening the folder's weights gives."""
    with pytest.raises(UserError) as error:
        SafetensorsWeights(folder)
    told = str(error.value)
    assert "\n" not in told
    assert len(told) < 5000
    return told


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    (tmp_path / SAFETENSORS_FILE).write_bytes(content)
    told = refusal(tmp_path)
    assert told.startswith(f"{tmp_path / SAFETENSORS_FILE} ")
    assert message in told


READ: dict[str, bytes] = {
    "as it is": file_of(HEADER),
    "no metadata": file_of({"a": ENTRY_A, "b": ENTRY_B}),
    "spaces after the header": file_of(TEXT + b" " * 100),
    "tensors in another order": file_of({"b": ENTRY_B, "a": ENTRY_A}),
    "more in an entry": with_a(comment="mine"),
    "escaped names": file_of(TEXT.replace(b'"a"', b'"\\u0061"')),
    "an empty tensor between two": file_of(
        HEADER | {"c": {"dtype": "I64", "shape": [0, 2**40], "data_offsets": [24, 24]}}
    ),
    "a scalar": file_of({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"\0\0\x80?"),
    "no tensor": file_of({}, b""),
}


@pytest.mark.parametrize("case", READ)
def test_read_as_by_the_library(tmp_path: Path, case: str) -> None:
    library = pytest.importorskip("safetensors.numpy")
    (tmp_path / SAFETENSORS_FILE).write_bytes(READ[case])
    weights = SafetensorsWeights(tmp_path)
    expected = library.load(READ[case])
    assert weights.shapes == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        if tensor.size:
            np.testing.assert_array_equal(weights.read(name), tensor)


def index(folder: Path, weight_map: Any) -> Path:
    """A folder of two shards, with tensor a in one and b in the other, and this index."""
    folder.mkdir()
    (folder / "1.safetensors").write_bytes(file_of({"a": ENTRY_A}, A.tobytes()))
    (folder / "2.safetensors").write_bytes(file_of({"b": ENTRY_B | {"data_offsets": [0, 8]}}, B.tobytes()))
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


INDEXES: dict[str, tuple[Any, str]] = {
    "a file above the folder": ({"a": "../model/1.safetensors", "b": "2.safetensors"}, "lacks files that"),
    "a full path": (
        {"a": "/etc/passwd", "b": "2.safetensors"},
        "lacks files that model.safetensors.index.json lists: /etc",
    ),
    "a file by way of this folder": ({"a": "./1.safetensors", "b": "2.safetensors"}, "lacks files that"),
    "an empty name": ({"a": "", "b": "2.safetensors"}, "lacks files that"),
    "this folder": ({"a": ".", "b": "2.safetensors"}, "lacks files that"),
    "a name with a zero": ({"a": "1.safetensors\0", "b": "2.safetensors"}, "lacks files that"),
    "a list": ([["a", "1.safetensors"]], "has no weight_map from tensors to files"),
    "null": (None, "has no weight_map from tensors to files"),
    "a number": ({"a": 1}, "has no weight_map from tensors to files"),
    "a list of files": ({"a": ["1.safetensors"]}, "has no weight_map from tensors to files"),
    "nothing": ({}, "has no weight_map from tensors to files"),
    "the index itself": ({"a": INDEX_FILE, "b": "2.safetensors"}, "is damaged or no safetensors file"),
    "a tensor that is not there": (
        {"a": "1.safetensors", "c": "2.safetensors"},
        "lists tensors that are not there: c in",
    ),
    "files and tensors exchanged": (
        {"a": "2.safetensors", "b": "1.safetensors"},
        "lists tensors that are not there: a in",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_is_refused(tmp_path: Path, case: str) -> None:
    weight_map, message = INDEXES[case]
    assert message in refusal(index(tmp_path / "model", weight_map))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    """A pipe is not waited for; a link leads to a file, as in the hub's cache, or nowhere."""
    path = tmp_path / SAFETENSORS_FILE
    kinds: list[tuple[Callable[[Path], object], str]] = [
        (os.mkfifo, "model.safetensors is no file; copy or download it again"),
        (Path.mkdir, "model.safetensors cannot be read (Is a directory)"),
        (lambda p: p.symlink_to("/dev/zero"), "model.safetensors is no file; copy or download it again"),
        (lambda p: p.symlink_to("nothing"), "model.safetensors is no file; copy or download it again"),
        (lambda p: p.symlink_to(p), "model.safetensors is no file; copy or download it again"),
    ]
    for make, message in kinds:
        make(path)
        assert message in refusal(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "blob").write_bytes(file_of(HEADER))
    path.symlink_to("blob")
    assert SafetensorsWeights(tmp_path).shapes == {"a": (2, 3), "b": (4,)}


def test_a_file_beside_shards(tmp_path: Path) -> None:
    """The one file counts, as in transformers, and that is told."""
    folder = index(tmp_path / "model", {"a": "1.safetensors", "b": "2.safetensors"})
    assert SafetensorsWeights(folder).shapes == {"a": (2, 3), "b": (4,)}
    assert SafetensorsWeights(folder).notes == ()
    (folder / SAFETENSORS_FILE).write_bytes(file_of({"a": ENTRY_A}, A.tobytes()))
    weights = SafetensorsWeights(folder)
    assert weights.shapes == {"a": (2, 3)}
    assert weights.notes == ("model.safetensors counts, not the files that model.safetensors.index.json lists",)


@pytest.mark.parametrize(
    ("dtype", "code"), [("<f8", "F64"), ("<f4", "F32"), ("<f2", "F16"), (ml_dtypes.bfloat16, "BF16")]
)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_no_finite_number(tmp_path: Path, dtype: Any, code: str, number: float) -> None:
    numbers = np.array([0, number, 1], dtype)
    entry = {"dtype": code, "shape": [3], "data_offsets": [0, numbers.nbytes]}
    (tmp_path / SAFETENSORS_FILE).write_bytes(file_of({"x": entry}, numbers.tobytes()))
    with pytest.raises(UserError, match=r"^tensor x in \S+ has numbers that are not finite \(nan or infinity\)"):
        SafetensorsWeights(tmp_path).read("x")


def test_too_large_for_float32(tmp_path: Path) -> None:
    numbers = np.array([1e300])
    entry = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    (tmp_path / SAFETENSORS_FILE).write_bytes(file_of({"x": entry}, numbers.tobytes()))
    with pytest.raises(UserError, match=r"^tensor x in \S+ has numbers that are not finite"):
        SafetensorsWeights(tmp_path).read("x")


NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 24.0, True, None]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", 3]),
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file with other entries, or with other bytes anywhere."""
    header = {"a": ENTRY_A, "b": ENTRY_B} | draw(st.dictionaries(st.sampled_from("abc"), ENTRIES, max_size=2))
    content = bytearray(file_of(header))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(content)


@settings(max_examples=250, deadline=timedelta(seconds=20))
@given(content=files())
def test_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """What is read is what the library reads; what it refuses is refused in a line."""
    library = pytest.importorskip("safetensors")
    folder = tmp_path_factory.getbasetemp() / "any_safetensors"
    folder.mkdir(exist_ok=True)
    (folder / SAFETENSORS_FILE).write_bytes(content)
    ours: SafetensorsWeights | None = None
    with at_most(megabytes=100), contextlib.suppress(UserError):
        ours = SafetensorsWeights(folder)
    if ours is None:
        assert "\n" not in refusal(folder)
        return
    theirs = dict(library.deserialize(content))
    assert ours.shapes == {name: tuple(tensor["shape"]) for name, tensor in theirs.items()}
