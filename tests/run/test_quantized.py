"""Parameters in int8: what they are rounded to, what a model of them computes, and what is kept for the next start."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import gpt_jax
from gpt_jax.errors import UserError
from gpt_jax.interop.save import parts_of
from gpt_jax.model import weight
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_logits, head_VD, logits_NV
from gpt_jax.model.weight import int8_product
from gpt_jax.run import quantized as module
from gpt_jax.run.load import load_model, open_source
from gpt_jax.run.quantized import MOST_KEPT, quantize, quantized, tree_of
from gpt_jax.sample.decode import DECODING_OPTIONS
from gpt_jax.storage.files import locked
from tests import tiny
from tests.cases import cases
from tests.commands import refused_here, run_here
from tests.interop.models import publish


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_each_row_is_rounded_to_255_numbers(matrix: np.ndarray) -> None:
    values, scale = quantize(matrix)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert np.all(scale > 0)
    most = np.abs(matrix).max(axis=1)
    sizes = np.abs(values.astype(int)).max(axis=1)
    normal = most > 1e-35  # The scales of smaller numbers are subnormal, and themselves rounded.
    np.testing.assert_array_equal(sizes[normal], 127)
    np.testing.assert_array_equal(values[most == 0], 0)
    errors = np.abs(values * scale[:, None].astype(np.float64) - matrix)
    assert np.all(errors[normal] <= scale[normal, None] * 0.50001)
    values, scale = quantize(-matrix)
    np.testing.assert_array_equal(-values, quantize(matrix)[0])


product = jax.jit(int8_product, static_argnums=3, compiler_options=DECODING_OPTIONS)


@pytest.mark.parametrize("n", [1, 2, 9, 70])
@pytest.mark.parametrize("width", [48, 5000])
def test_the_product(rng: np.random.Generator, n: int, width: int) -> None:
    """To the rounding of its rows, on a CPU: to half a step of as many as there are in int32 for the sum."""
    x_ND, (kernel_FD, scale_F) = rng.normal(size=(n, width)).astype(np.float32), quantize(rng.normal(size=(33, width)))
    matrix_FD = kernel_FD * scale_F[:, None].astype(np.float64)
    expected = x_ND.astype(np.float64) @ matrix_FD.T
    steps = min(2**14 - 2**7, (2**31 - 1) // (127 * width))
    half_N1 = np.abs(x_ND).max(axis=1, keepdims=True) / steps / 2
    bound_NF = half_N1 * np.abs(matrix_FD).sum(axis=1) + 1e-5
    ours = product(x_ND, kernel_FD, scale_F, "float32")
    assert np.all(np.abs(ours - expected) <= bound_NF)
    assert np.linalg.norm(ours - expected) < 1e-3 * np.linalg.norm(expected)
    rounded = np.asarray(product(x_ND.astype(jnp.bfloat16), kernel_FD, scale_F, "bfloat16"), np.float32)
    assert np.linalg.norm(rounded - expected) < 2**-7 * np.linalg.norm(expected)


def test_the_largest_sums_have_room() -> None:
    for width in (576, 1040, 1041, 8192, 57344):
        x_ND, kernel_FD = np.full((2, width), 3, np.float32), np.full((2, width), 127, np.int8)
        x_ND[1], kernel_FD[1] = -3, -127
        expected = np.array([[381, -381], [-381, 381]], np.float64) * width
        for n in (1, 2):
            ours = product(x_ND[:n], kernel_FD, np.ones(2, np.float32), "float32")
            np.testing.assert_allclose(ours, expected[:n], rtol=1e-6)


@given(arrays(np.float32, (5, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.integers(0, 2**32), st.data())
def test_the_product_of_a_row_does_not_depend_on_others(x_ND: np.ndarray, seed: int, data: st.DataObject) -> None:
    """Alone, it is another program; and equal to the last bit."""
    kernel_FD, scale_F = quantize(np.random.default_rng(seed).normal(size=(33, 40)))
    together = np.asarray(product(x_ND, kernel_FD, scale_F, "float32"))
    order = data.draw(st.permutations(range(5)))
    np.testing.assert_array_equal(product(x_ND[order], kernel_FD, scale_F, "float32"), together[order])
    for i in range(5):
        np.testing.assert_array_equal(product(x_ND[i : i + 1], kernel_FD, scale_F, "float32"), together[i : i + 1])
    bad = x_ND.copy()
    bad[order[0], 7] = data.draw(st.sampled_from([np.nan, np.inf]))
    ours = np.asarray(product(bad, kernel_FD, scale_F, "float32"))
    assert np.all(np.isnan(ours[order[0]]))
    np.testing.assert_array_equal(ours[order[1:]], together[order[1:]])


def in_int8(params: Params, config: Any) -> Params:
    return tree_of(dict(quantized(parts_of(params), config)))


def in_float32(params: Params, config: Any) -> Params:
    """The same values, as float32."""

    def back(tree: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {name: back(part) for name, part in tree.items() if isinstance(part, dict)}
        for name, part in tree.items():
            if name == "kernel_FD":
                out["kernel"] = (part * tree["scale_F"][:, None]).T
            elif f"{name[:-3]}_scale_V" in tree:
                out[name] = part * tree[f"{name[:-3]}_scale_V"][:, None]
            elif not isinstance(part, dict) and "scale_" not in name:
                out[name] = part
        return out

    layers = jax.tree.map(lambda *xs: np.stack(xs), *map(back, params["layers"]))
    return {**back({name: part for name, part in params.items() if name != "layers"}), "layers": layers}


@pytest.mark.parametrize("name", cases(tiny.ARCHITECTURES, ["gpt2", "gemma"]))
@pytest.mark.parametrize("is_cpu", [False, True])
def test_a_model_computes_with_the_rounded_values(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, is_cpu: bool
) -> None:
    """To a part of what the rounding of weights changes: a five-hundredth on accelerators, of which a CPU can compute
    the product, since sums of float32 in another order change Gemma's logits that much; and a fiftieth on a CPU, where
    activations are rounded, too."""
    if not is_cpu:
        monkeypatch.setattr(weight, "int8_product_on_cpu", weight.int8_product_as_it_stands)
    config = dataclasses.replace(tiny.ARCHITECTURES[name], lora=gpt_jax.Config().model.lora, unroll=True)
    model, params = GPT(config), tiny.uneven_params(config)
    rounded = in_int8(params, config)
    plain = in_float32(rounded, config)
    tokens_BT = jnp.asarray(rng.integers(0, config.vocab_size, (2, 20), np.int32))

    def logits(params: Params) -> tuple[jax.Array, jax.Array]:
        hidden_ND = forward(model, params, tokens_BT).reshape(-1, config.d_model)
        return logits_NV(model, params, hidden_ND), head_logits(hidden_ND, head_VD(params), config.vocab_size)

    expected, before = jax.jit(logits)(plain), jax.jit(logits)(params)
    for ours, theirs, exact in zip(jax.jit(logits)(rounded), expected, before, strict=True):
        assert np.linalg.norm(ours - theirs) < (0.02 if is_cpu else 0.002) * np.linalg.norm(exact - theirs)
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(rounded) if "kernel" in str(path)]
    assert {x.dtype for x in kernels} == {np.dtype(np.int8)}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    publish(tmp_path / "model")
    return tmp_path / "model"


def kept(published: Path) -> list[Path]:
    return sorted((published.parent / "cache/gpt_jax/int8").glob("[!.]*"))


def leaves(published: Path, context_length: int = 0) -> list[np.ndarray]:
    loaded = load_model(open_source(str(published)), context_length, quantize="int8")
    return [np.asarray(x) for x in jax.tree.leaves(loaded.params)]


def test_the_second_start_reads_what_the_first_kept(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, [file] = leaves(published), kept(published)
    with monkeypatch.context() as patch:
        patch.setattr(module, "quantized", None)
        jax.tree.map(np.testing.assert_array_equal, leaves(published), first)

    file.write_bytes(file.read_bytes()[:-200])  # Damaged: made anew.
    jax.tree.map(np.testing.assert_array_equal, leaves(published), first)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    jax.tree.map(np.testing.assert_array_equal, leaves(published), first)
    assert kept(published) == [file]

    weights = published / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # Another model in its place.
    leaves(published)
    for context in range(20, 20 + MOST_KEPT):
        leaves(published, context)
    assert len(kept(published)) == MOST_KEPT
    assert file not in kept(published)


def test_a_cache_that_cannot_be_written_is_told(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published.parent / "cache").write_text("no folder")
    leaves(published)
    err = capsys.readouterr().err
    assert err.startswith("the int8 parameters are not kept for the next start: ")
    assert err.count("\n") == 1


def test_of_two_processes_one_keeps_them(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which would write to the same temporary file."""
    first, [file] = leaves(published), kept(published)
    file.unlink()
    with locked(file.parent / ".lock", ""):
        jax.tree.map(np.testing.assert_array_equal, leaves(published), first)
    assert kept(published) == []
    leaves(published)
    assert kept(published) == [file]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_runs_and_runs_of_adapters(tiny_data: Path, published: Path) -> None:
    """Adapters are folded into their matrices before these are rounded."""
    folder = published.parent
    common = ["--data.dir", tiny_data, "--train.steps=2", "--train.eval-every=0", "--optimizer.warmup-steps=1"]
    small = ["--model.n-layer=1", "--model.d-model=32", "--model.n-head=2", "--model.context-length=32"]
    run_here("train", *common, *small, "--data.batch-size=8", "--out-dir", folder / "base")
    adapters = [
        "--optimizer.learning-rate=0.1",
        "--init-from",
        folder / "base",
        "--model.lora.rank=2",
        "--model.context-length=32",
    ]
    run_here("train", *common, *adapters, "--data.batch-size=8", "--out-dir", folder / "tuned")
    for name in ("base", "tuned"):
        whole = load_model(open_source(str(folder / name)))
        ours = load_model(open_source(str(folder / name)), quantize="int8")
        expected = in_int8(whole.params, whole.model.config)
        for found, theirs in zip(*map(jax.tree.leaves, (ours.params, expected)), strict=True):
            np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(theirs, np.float32), atol=1, rtol=1e-5)
    assert len(kept(published)) == 2
    out, _ = run_here("eval", "--run", folder / "tuned", "--quantize=int8", "--json")
    exact, _ = run_here("eval", "--run", folder / "tuned", "--json")
    assert json.loads(out)["loss"] == pytest.approx(json.loads(exact)["loss"], rel=1e-2)
    assert json.loads(out)["loss"] != json.loads(exact)["loss"]
    out, _ = run_here("sample", "--run", folder / "tuned", "--quantize=int8", "--max-new-tokens=5", "--json")
    assert len(json.loads(out)["tokens"]) == 5


def test_programs_score_and_write_in_int8(published: Path) -> None:
    exact, rounded = gpt_jax.load(published), gpt_jax.load(published, quantize="int8")
    text = "one two three"
    assert rounded.generate(text, max_new_tokens=4, seed=1).tokens
    assert rounded.score(text).perplexity == pytest.approx(exact.score(text).perplexity, rel=0.1)
    np.testing.assert_allclose(rounded.logits(text), exact.logits(text), atol=0.1 * np.abs(exact.logits(text)).max())


def test_what_cannot_be_is_told(published: Path) -> None:
    with pytest.raises(UserError, match="quantize = 'int4' must be one of none, int8"):
        gpt_jax.load(published, quantize="int4")  # type: ignore[arg-type]
    assert "int4" in refused_here("sample", "--model", published, "--quantize", "int4", status=2)
    line = refused_here("sample", "--model", published, "--quantize=int8", "--parallel.fsdp=2", "--prompt=one")
    assert line == "error: int8 parameters are not divided over a mesh: leave out --parallel.*, or --quantize int8"
