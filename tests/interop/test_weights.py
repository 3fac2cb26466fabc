"""Safetensors files are read to the bit, written as transformers reads them, and refused in one line when damaged."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.interop import weights as weights_module
from gpt_jax.interop.weights import INDEX_FILE, SAFETENSORS_FILE, SafetensorsWeights, load_json, write_safetensors
from tests.commands import ROOT

DTYPES: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}


def encode(tensors: dict[str, np.ndarray], **changes: object) -> bytes:
    """A safetensors file, made as its format says. changes: instead of an entry of the header."""
    names = {np.dtype(dtype): name for name, dtype in [*DTYPES.items(), ("BOOL", "?"), ("I64", "<i8")]}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header | changes).encode()
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensor.tobytes() for tensor in tensors.values())


def some_tensors(rng: np.random.Generator, dtype: np.typing.DTypeLike = np.float32) -> dict[str, np.ndarray]:
    shapes = {"matrix": (37, 19), "vector": (41,), "scalar": (), "empty": (0, 3), "mask": (1, 1, 5, 5)}
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even small tensors take several."""
    monkeypatch.setattr(weights_module, "SLICE_ELEMENTS", 64)


@pytest.mark.parametrize("name", DTYPES)
def test_reads_every_float_type(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    tensors = some_tensors(rng, np.dtype(DTYPES[name]))
    (tmp_path / SAFETENSORS_FILE).write_bytes(encode(tensors))
    weights = SafetensorsWeights(tmp_path)
    assert weights.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    assert weights.where == str(tmp_path)
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor.astype(np.float32))


def test_reads_into_any_strides(tmp_path: Path, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((37, 19)).astype(np.float32)
    (tmp_path / "any-name.safetensors").write_bytes(encode({"matrix": matrix}))
    stacked = np.full((3, 19, 37), np.nan, np.float32)
    out = stacked[1].T
    assert SafetensorsWeights(tmp_path).read("matrix", out) is out
    np.testing.assert_array_equal(stacked[1], matrix.T)
    assert np.isnan(stacked[[0, 2]]).all()


def test_buffers_of_whole_numbers_may_lie_there_but_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / SAFETENSORS_FILE).write_bytes(encode({"mask": np.ones((2, 2), bool), "ids": np.arange(3)}))
    weights = SafetensorsWeights(tmp_path)
    assert weights.shapes == {"mask": (2, 2), "ids": (3,)}
    with pytest.raises(UserError, match=r"tensor ids in .*model\.safetensors is of whole numbers \(I64\)"):
        weights.read("ids")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1500, 1], ids=["one file", "two shards", "a shard a tensor"])
def test_what_is_written_is_read(tmp_path: Path, rng: np.random.Generator, dtype: str, max_shard_bytes: int) -> None:
    tensors = some_tensors(rng)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_safetensors(tmp_path, shapes, tensors.__getitem__, dtype, max_shard_bytes)  # type: ignore[arg-type]
    weights = SafetensorsWeights(tmp_path)
    assert weights.shapes == shapes
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights.read(name), tensor.astype(dtype).astype(np.float32))
    itemsize = np.dtype(dtype).itemsize
    files = sorted(path.name for path in tmp_path.iterdir())
    if max_shard_bytes == 10**9:
        assert files == [SAFETENSORS_FILE]
    else:
        index = load_json(tmp_path / INDEX_FILE)
        n = sum(tensor.size for tensor in tensors.values())
        assert index["metadata"] == {"total_parameters": n, "total_size": n * itemsize}
        shards = sorted(set(index["weight_map"].values()))
        assert files == sorted([*shards, INDEX_FILE])
        assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for shard in shards:
            inside = sum(tensors[name].size for name, file in index["weight_map"].items() if file == shard)
            assert inside * itemsize <= max(max_shard_bytes, tensors["matrix"].size * itemsize)
    # A second time from what was read: the same bytes.
    again = tmp_path / "again"
    again.mkdir()
    write_safetensors(again, weights.shapes, weights.read, dtype, max_shard_bytes)  # type: ignore[arg-type]
    assert [path.name for path in sorted(again.iterdir())] == files
    assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    # bfloat16 keeps 7 bits of the fraction: halves of the last one go to the even neighbour.
    numbers = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.38e38], np.float32)
    write_safetensors(tmp_path, {"x": numbers.shape}, lambda _: numbers, "bfloat16")
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, -1, 254 * 2.0**120], np.float32)
    np.testing.assert_array_equal(SafetensorsWeights(tmp_path).read("x"), expected)


@pytest.mark.parametrize(("dtype", "number"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_too_large_for_the_type(tmp_path: Path, dtype: Any, number: float) -> None:
    numbers = np.array([1.0, number], np.float32)
    with pytest.raises(UserError, match=rf"^tensor x has numbers too large for {dtype}; export in float32$"):
        write_safetensors(tmp_path, {"x": (2,)}, lambda _: numbers, dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70, 129])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path: Path, number: float, place: int) -> None:
    """In whichever slice it is, and also where the sum of the others overflows."""
    numbers = np.full(130, 3e38, np.float32)
    write_safetensors(tmp_path, {"x": (130,)}, lambda _: numbers)
    np.testing.assert_array_equal(SafetensorsWeights(tmp_path).read("x"), numbers)
    numbers[place] = number
    with pytest.raises(UserError, match=r"^tensor x has numbers that are not finite \(nan or infinity\)"):
        write_safetensors(tmp_path, {"x": (130,)}, lambda _: numbers, "bfloat16")
    (tmp_path / SAFETENSORS_FILE).write_bytes(encode({"x": numbers}))
    with pytest.raises(UserError, match=r"^tensor x in \S+model.safetensors has numbers that are not finite \(nan or"):
        SafetensorsWeights(tmp_path).read("x")


GOOD: dict[str, np.ndarray] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged or no safetensors file: it begins with no header"),
    "text": (b"<!DOCTYPE html><html>", "begins with no header"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only points to a file in Git LFS"),
    "header cut": (encode(GOOD)[:40], "is cut short"),
    "numbers cut": (encode(GOOD)[:-1], "is cut short"),
    "too long": (encode(GOOD) + b"more", "4 bytes follow the last tensor"),
    "no JSON": ((4).to_bytes(8, "little") + b"{{{{", "its header is no table of tensors in JSON"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "its header is no table of tensors in JSON"),
    "no UTF-8": ((4).to_bytes(8, "little") + b'"\xff\xff"', "its header is no table of tensors in JSON"),
    "deep": ((200000).to_bytes(8, "little") + b"[" * 200000, "its header is no table of tensors in JSON"),
    "no entry": (encode(GOOD, a=3), "its header is no table of tensors in JSON"),
    "no shape": (encode(GOOD, a={"dtype": "F32", "data_offsets": [0, 24]}), "its header is no table of tensors"),
    "three offsets": (encode(GOOD, a=ENTRY | {"data_offsets": [0, 1, 24]}), "its header is no table of tensors"),
    "other shape": (encode(GOOD, a=ENTRY | {"shape": [2, 4]}), "tensor a has 24 bytes, where its shape needs 32"),
    "negative": (encode(GOOD, a=ENTRY | {"shape": [-2, -3]}), "tensor a has 24 bytes, where its shape needs 24"),
    "overlap": (encode(GOOD, c=ENTRY), "tensor c does not begin where the one before it ends"),
    "gap": (encode(GOOD, b={"dtype": "F16", "shape": [2], "data_offsets": [28, 32]}), "tensor b does not begin"),
    "before": (encode(GOOD, a=ENTRY | {"data_offsets": [-24, 0]}), "tensor a does not begin"),
    "types": (
        encode(GOOD, a=ENTRY | {"dtype": "F8_E4M3"}, b=ENTRY | {"dtype": "I4"}),
        r"types that are not supported: a \(F8_E4M3\), b \(I4\); take the model in float32, float16 or bfloat16",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / SAFETENSORS_FILE
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} [^\n]*{message}[^\n]*$"):
        SafetensorsWeights(tmp_path)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SAFETENSORS_FILE
    path.write_bytes(encode(GOOD))
    weights = SafetensorsWeights(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    weights.read("a")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is cut short; copy or download it again$"):
        weights.read("b")
    path.unlink()
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} cannot be read \(No such file or directory\)$"):
        weights.read("b")


def sharded(folder: Path, index: object) -> Path:
    folder.joinpath("1.safetensors").write_bytes(encode({"a": np.ones(2, np.float32)}))
    folder.joinpath("2.safetensors").write_bytes(encode({"b": np.ones(2, np.float32)}))
    folder.joinpath(INDEX_FILE).write_text(json.dumps(index))
    return folder


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rmdir(), r"cannot be read \(No such file or directory\)"),
    "nothing": (lambda f: None, r"there are no weights in .*: no \*\.safetensors file"),
    "pickles": (
        lambda f: [(f / n).write_bytes(b"") for n in ("pytorch_model.bin", "config.json")],
        r"has its weights only in pytorch_model\.bin, .*convert them to safetensors",
    ),
    "no index": (
        lambda f: [(f / n).write_bytes(encode(GOOD)) for n in ("x.safetensors", "y.safetensors")],
        r"has x\.safetensors, y\.safetensors, but no model\.safetensors\.index\.json",
    ),
    "bad index": (lambda f: (f / INDEX_FILE).write_text("{"), r"index\.json holds no JSON object"),
    "no map": (lambda f: sharded(f, {"weight_map": {"a": 3}}), r"index\.json has no weight_map"),
    "no shard": (
        lambda f: sharded(f, {"weight_map": {"a": "1.safetensors", "b": "3.safetensors", "c": "../4.safetensors"}}),
        r"lacks files that model\.safetensors\.index\.json lists: \.\./4\.safetensors, 3\.safetensors; download them",
    ),
    "no tensor": (
        lambda f: sharded(f, {"weight_map": dict.fromkeys("abc", "1.safetensors")}),
        r"lists tensors that are not there: b in 1\.safetensors, c in 1\.safetensors",
    ),
    "other shard": (
        lambda f: sharded(f, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}),
        r"lists tensors that are not there: a in 2\.safetensors, b in 1\.safetensors",
    ),
    "twice": (
        lambda f: (
            sharded(f, {"weight_map": {"a": "1.safetensors", "b": "3.safetensors"}}),
            (f / "2.safetensors").rename(f / "3.safetensors").write_bytes(encode(GOOD)),
        ),
        r"3\.safetensors has tensors that 1\.safetensors has, too: a; remove one of them",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = BAD_FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        SafetensorsWeights(folder)


def test_many_names_are_cut_down_to_one_line() -> None:
    assert weights_module.few(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert weights_module.few(["a", "b"], most=2) == "a, b"


def test_memory_is_that_of_the_result(tmp_path: Path) -> None:
    """Reading 64 MB of bfloat16 into 128 MB of float32, and writing them back, takes little memory besides."""
    with (tmp_path / SAFETENSORS_FILE).open("wb") as file:
        header = json.dumps({"x": {"dtype": "BF16", "shape": [8192, 4096], "data_offsets": [0, 2**26]}}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**26)
    (tmp_path / "out").mkdir()
    program = f"""
from pathlib import Path
from gpt_jax.interop.weights import SafetensorsWeights, write_safetensors
from tests.memory import at_most
with at_most(134 + 16):
    weights = SafetensorsWeights(Path({str(tmp_path)!r}))
    x = weights.read("x")
    write_safetensors(Path({str(tmp_path / "out")!r}), weights.shapes, lambda _: x, "bfloat16")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert SafetensorsWeights(tmp_path / "out").shapes == {"x": (8192, 4096)}


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
def test_transformers_reads_what_we_write_and_we_what_it_writes(
    tmp_path: Path, dtype: str, max_shard_bytes: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    weights = SafetensorsWeights(tmp_path / "theirs")
    assert (tmp_path / "theirs" / INDEX_FILE).exists() == (max_shard_bytes < 10**9)
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items() if name in weights.shapes}
    assert weights.shapes == {name: tensor.shape for name, tensor in theirs.items()}
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(weights.read(name), tensor)

    ours = tmp_path / "ours"
    ours.mkdir()
    write_safetensors(ours, weights.shapes, weights.read, dtype, max_shard_bytes)  # type: ignore[arg-type]
    config.save_pretrained(ours)
    again, report = transformers.GPT2LMHeadModel.from_pretrained(ours, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)
