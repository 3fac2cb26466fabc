import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import CHUNK_BYTES, Checkpoints, DamagedCheckpointError
from gpt_jax.run.checksums import named_checksums


def make(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(30, 100)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=7), jnp.float32)},
    }
    return params, {"mu": params, "count": jnp.int32(seed)}


def save(folder: Path, losses: dict[int, float | None], keep: int = 2) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, *make(step), {"config": {}, "tokenizer": "", "data": "", "fact": step}, loss)


def target(tree: Any, n_devices: int = 1) -> Any:
    return Placement(jax.devices()[:n_devices]).abstract(tree)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("n_devices", [1, 2, 8])
def test_what_was_saved_is_restored_on_any_number_of_devices(tmp_path: Path, n_devices: int) -> None:
    save(tmp_path, {5: 1.0})
    params, opt_state = make(5)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5]
        assert checkpoints.meta(5)["fact"] == 5
        restored = checkpoints.restore(5, "params", target(params, n_devices))
        assert_equal(restored, params)
        assert len(restored["a"].devices()) == n_devices
        assert_equal(checkpoints.restore(5, "opt_state", target(opt_state, n_devices)), opt_state)


def test_arrays_are_written_in_chunks_and_read_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a host that restores a part of an array has not to read, and hold, all of it, nor all arrays at once."""
    monkeypatch.setattr("gpt_jax.run.checkpoint.READ_AT_ONCE_GB", 0.02)  # One of the two arrays, and the other waits.
    tree = {name: jnp.full((4, 1024, 1024), value) for name, value in {"a": 1.0, "b": 2.0}.items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, tree, {"config": {}, "tokenizer": "", "data": ""}, None)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for item in ("params", "opt_state"):
            for leaf in jax.tree.leaves(checkpoints.restore_metadata(1, item)):
                assert np.prod(leaf.storage.chunk_shape) * 4 <= CHUNK_BYTES
        assert_equal(checkpoints.restore(1, "params", target(tree, 8)), tree)
        monkeypatch.setattr("gpt_jax.run.checkpoint.READ_AT_ONCE_GB", 0.01)
        with pytest.raises(DamagedCheckpointError, match="Requested more bytes than we reserved space for"):
            checkpoints.restore(1, "params", target(tree, 8))


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5})
    save(tmp_path, {5: 2.2, 6: None})  # Another process, as after a resume.
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2


def test_meta_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    assert {path.name for path in (tmp_path / "1").iterdir()} >= {"params", "opt_state", "meta"}
    assert json.loads((tmp_path / "1" / "meta" / "metadata").read_text())["fact"] == 1


def test_a_change_of_any_one_element_changes_the_checksum() -> None:
    base = np.linspace(-1, 1, 64, dtype=np.float32)
    checksum = named_checksums({"x": jnp.asarray(base)})["x"]
    for i in range(64):
        for bit in (0, 13, 31):
            bits = base.view(np.uint32).copy()
            bits[i] ^= np.uint32(1 << bit)
            assert named_checksums({"x": jnp.asarray(bits.view(np.float32))})["x"] != checksum
    assert named_checksums({"x": jnp.asarray(base[::-1])})["x"] != checksum


def reference_checksum(x: np.ndarray) -> int:
    """The sum of MurmurHash3's finaliser of each 32-bit part plus a multiple of its index, modulo 2**32, by NumPy."""
    bits = np.ascontiguousarray(x).view(f"u{min(x.itemsize, 4)}").ravel().astype(np.uint64)
    h = (bits + np.arange(bits.size, dtype=np.uint64) * np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return int(np.sum(h ^ (h >> np.uint64(16)))) & 0xFFFFFFFF


DTYPES = [
    "float32",
    "int32",
    "uint32",
    "bfloat16",
    "float16",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "bool",
    "float8_e4m3fn",
    "float64",
    "int64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_type_have_a_checksum(dtype: str, rng: np.random.Generator) -> None:
    """That of the formula; and one changed bit changes it."""
    values = np.asarray(rng.normal(scale=50, size=(3, 4))).astype(jnp.dtype(dtype))
    other = values.copy()
    other.view(np.uint8)[1, 2] ^= 1
    with jax.enable_x64(True):  # So that the arrays of 64 bits are those.
        sums = named_checksums({"x": jnp.asarray(values), "y": jnp.asarray(other)})
    assert sums == {"x": reference_checksum(values), "y": reference_checksum(other)}
    assert sums["x"] != sums["y"]


@pytest.mark.parametrize(
    "content",
    [
        lambda facts: json.dumps(facts)[:-1],
        lambda facts: "[]",
        lambda facts: json.dumps({**facts, "checksums": None}),
        lambda facts: json.dumps({**facts, "checksums": {"params": {}}}),
        *(
            lambda facts, name=name: json.dumps({k: v for k, v in facts.items() if k != name})
            for name in ("config", "tokenizer", "data", "checksums")
        ),
    ],
)
def test_facts_that_are_not_whole_are_damage(tmp_path: Path, content: Callable[[dict[str, Any]], str]) -> None:
    """And no other error, after which resuming would not fall back to an older checkpoint."""
    save(tmp_path, {1: None})
    meta = tmp_path / "1" / "meta" / "metadata"
    meta.write_text(content(json.loads(meta.read_text())))
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(DamagedCheckpointError, match=r"/1 is damaged: meta (is not whole|cannot be read)"),
    ):
        checkpoints.restore(1, "opt_state", target(make(1)[1]))


def test_only_reports_of_orbax_are_kept_back_and_in_its_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program around, such as a notebook with threads, keeps its own levels, filters and hook."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)

    def settings() -> list[object]:
        return [sys.unraisablehook, *((logger.level, list(logger.filters)) for logger in loggers)]

    def logged() -> list[str]:
        caplog.clear()
        for logger in loggers:
            logger.error("something else")
            logger.error("a task of orbax was never awaited")
        return [record.getMessage() for record in caplog.records]

    before = settings()
    everything = logged()
    assert len(everything) == 4
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path, read_only=True)
    assert settings() == before
    first.__enter__()  # As two threads do, neither within the other.
    second.__enter__()
    assert logged() == ["something else"] * 2
    first.__exit__(None, None)
    assert logged() == ["something else"] * 2
    second.__exit__(None, None)
    assert settings() == before
    assert logged() == everything
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, read_only=True):
        raise KeyboardInterrupt
    assert settings() == before


def data_files(folder: Path) -> list[Path]:
    """The files of the params item that its arrays are read from."""
    files = [p for p in (folder / "1" / "params").rglob("*") if p.is_file()]
    return [p for p in files if p.name != "_sharding" and "commit_success" not in p.name]


def restored_whole(checkpoints: Checkpoints, params: Any) -> Any:
    return checkpoints.restore(1, "params", target(params))


def restored_by_parts(checkpoints: Checkpoints, params: Any) -> Any:
    read = checkpoints.open_parts(1, "params", params)
    return {"a": read("a", 0), "b": {"c": read("b/c", 0)}}


@pytest.mark.parametrize("restored", [restored_whole, restored_by_parts])
@pytest.mark.parametrize("how", ["cut short", "changed", "removed"])
def test_no_damage_goes_unseen(
    tmp_path: Path, how: str, restored: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever file of the parameters is damaged: they come back as they were, or the damage is told in one line."""
    whole = tmp_path / "whole"
    save(whole, {1: None})
    params, _ = make(1)
    noticed = 0
    for i, path in enumerate(data_files(whole)):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        file = folder / path.relative_to(whole)
        content = file.read_bytes()
        middle = len(content) // 2
        if how == "removed":
            file.unlink()
        else:
            changed = bytes([content[middle] ^ 0x10])
            file.write_bytes(content[:middle] + (b"" if how == "cut short" else changed + content[middle + 1 :]))
        with Checkpoints(folder, read_only=True) as checkpoints:
            try:
                assert_equal(restored(checkpoints, params), params)
            except DamagedCheckpointError as e:
                message = str(e)
                noticed += 1
                assert re.fullmatch(rf"checkpoint {folder / '1'} is damaged: params.+", message)  # One line.
    assert noticed >= 2
    assert capfd.readouterr().err == ""


def test_a_changed_value_is_named_by_its_leaf(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    meta = tmp_path / "1" / "meta" / "metadata"
    facts = json.loads(meta.read_text())
    facts["checksums"]["params"]["b/c"] ^= 1
    meta.write_text(json.dumps(facts))
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(DamagedCheckpointError, match="params/b/c is not as it was saved"),
    ):
        checkpoints.restore(1, "params", target(make(1)[0]))


def test_another_shape_is_named_by_its_leaf(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    other = {"a": jnp.zeros((30, 101)), "b": {"c": jnp.zeros(7)}}
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(
            UserError, match=r"params/a has shape \(30, 100\) in the checkpoint and \(30, 101\) in the model"
        ),
    ):
        checkpoints.restore(1, "params", target(other))


def test_another_structure_is_named_by_its_leaf(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    other = {"a": jnp.zeros((30, 100)), "b": {"d": jnp.zeros(7)}}
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"params/b/c has shape \(7,\) in the checkpoint and none in the model"),
    ):
        checkpoints.restore(1, "params", target(other))
