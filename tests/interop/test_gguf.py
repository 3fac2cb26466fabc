"""GGUF files give the tensors and the configuration of the model they were made from, or a reason in one line."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.interop.gguf import NAMES, GGUFWeights
from tests.commands import ROOT
from tests.interop.gguf_files import EMBEDDING, METADATA, header, tensor_entry, write

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType


def test_metadata_as_a_config_json(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"token_embd.weight": EMBEDDING})
    weights = GGUFWeights(path)
    assert weights.where == str(path)
    assert weights.config == {
        "model_type": "llama",
        "vocab_size": 3,
        "max_position_embeddings": 128,
        "hidden_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert weights.fields == METADATA | {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }
    assert weights.shapes == {"model.embed_tokens.weight": (3, 512)}
    np.testing.assert_array_equal(weights.read("model.embed_tokens.weight"), EMBEDDING)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"attention.sliding_window": 64}, {"model_type": "mistral", "sliding_window": 64}),
        ({"attention.key_length": 32, "rope.dimension_count": 32}, {"head_dim": 32}),
        ({"attention.head_count_kv": [4, 4]}, {"num_key_value_heads": 4}),
        ({"attention.head_count_kv": None}, {"num_key_value_heads": 8}),
        ({"rope.freq_base": None}, {"rope_theta": 10000.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_attn_factor": 1.0,
            },
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 16.0,
                }
            },
        ),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {}),
    ],
    ids=["window", "head width", "heads by layer", "heads", "theta", "linear", "yarn", "none"],
)
def test_settings(tmp_path: Path, changes: dict[str, Any], config: dict[str, Any]) -> None:
    plain = GGUFWeights(write(tmp_path / "plain.gguf", {"token_embd.weight": EMBEDDING})).config
    metadata = METADATA | {f"llama.{key}": value for key, value in changes.items()}
    changed = GGUFWeights(write(tmp_path / "x.gguf", {"token_embd.weight": EMBEDDING}, metadata)).config
    if "model_type" in config:
        plain = {key: value for key, value in plain.items() if not key.endswith("_bias")}
    assert changed == plain | config


def llama3_factors(factor: float, context: int) -> np.ndarray:
    """What llama.cpp's converter writes for rotary positions scaled as Llama 3.1's."""
    factors = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 64)
        if wavelength < context / 4:
            factors.append(1.0)
        elif wavelength > context:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_rotary_positions_of_llama_3(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": EMBEDDING, "rope_freqs.weight": llama3_factors(32.0, 8192)}
    weights = GGUFWeights(write(tmp_path / "x.gguf", tensors))
    expected = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert weights.config["rope_scaling"] == expected | {"original_max_position_embeddings": 8192}
    assert list(weights.shapes) == ["model.embed_tokens.weight"]

    metadata = METADATA | {"llama.rope.scaling.original_context_length": 4096}
    tensors["rope_freqs.weight"] = llama3_factors(8.0, 4096)
    weights = GGUFWeights(write(tmp_path / "x.gguf", tensors, metadata))
    assert weights.config["rope_scaling"] == expected | {"factor": 8.0, "original_max_position_embeddings": 4096}

    tensors["rope_freqs.weight"] = np.ones(32, np.float32)
    assert "rope_scaling" not in GGUFWeights(write(tmp_path / "x.gguf", tensors)).config

    for other in (llama3_factors(8.0, 4096), llama3_factors(8.0, 8192)[1:]):
        tensors["rope_freqs.weight"] = other
        with pytest.raises(UserError, match=r"^\S*x\.gguf has rotary positions that are not scaled as Llama 3's"):
            GGUFWeights(write(tmp_path / "x.gguf", tensors))


QUANTISED = ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
WITHOUT_QUANTISER = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", ["F32", "F16", *QUANTISED, *WITHOUT_QUANTISER])
def test_every_type_is_dequantised_as_the_package_does(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    """In slices, and into any strides. Where the package cannot quantise: random bytes, which all mean numbers; blocks
    with a scale of nan or infinity, which no model has, are made zeros."""
    kind = Type[name]
    shape = (700, 512)  # Two slices, and part of one.
    if name in WITHOUT_QUANTISER:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            blocks[~np.isfinite(gguf.quants.dequantize(blocks, kind)).all(axis=1)] = 0
        stored = blocks.reshape(shape[0], -1)
    else:
        stored = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    tensors = {"token_embd.weight": EMBEDDING, "blk.0.ffn_up.weight": stored, "output_norm.weight": EMBEDDING[0]}
    path = write(tmp_path / "x.gguf", tensors, types={"blk.0.ffn_up.weight": kind})
    expected = gguf.quants.dequantize(stored, kind)
    weights = GGUFWeights(path)
    assert weights.shapes["model.layers.0.mlp.up_proj.weight"] == shape
    np.testing.assert_array_equal(weights.read("model.layers.0.mlp.up_proj.weight"), expected)
    stacked = np.zeros((2, 512, 700), np.float32)
    weights.read("model.layers.0.mlp.up_proj.weight", stacked[1].T)
    np.testing.assert_array_equal(stacked[1], expected.T)
    assert not stacked[0].any()
    np.testing.assert_array_equal(weights.read("model.norm.weight"), EMBEDDING[0])


@pytest.mark.parametrize("architecture", NAMES)
def test_names_are_those_of_the_package(architecture: str) -> None:
    """The package has names of transformers, and of many others, to llama.cpp's; here it is the other way round."""
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, 3)
    for theirs, name in NAMES[architecture].items():
        assert names.get_name(name.format(2)) == theirs.format(2)
    known = {gguf.TENSOR_NAMES[tensor].format(bid="{}") for tensor in gguf.MODEL_TENSORS[kind]}
    constants = {"rope_freqs", "blk.{}.attn_rot_embd"}
    experts = {"blk.{}.ffn_gate_inp", "blk.{}.ffn_gate_exps", "blk.{}.ffn_up_exps", "blk.{}.ffn_down_exps"}
    assert known - constants - experts == set(NAMES[architecture])


def as_llama_cpp_has_it(architecture: str, name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """What convert_hf_to_gguf.py of llama.cpp does to a tensor."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    kind = name.split(".")[-2]
    if architecture == "llama" and kind in heads:
        n = heads[kind]
        return tensor.reshape(n, 2, len(tensor) // n // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 96, "n_inner": 80}),
    "llama": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("llama", {"num_key_value_heads": 2, "sliding_window": 16, "head_dim": 12}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 16}),
    "gemma3_text": ("gemma3", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16, "num_hidden_layers": 7}),
}
LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
KEYS = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.sliding_window": ("sliding_window",),
}


@pytest.mark.parity
@pytest.mark.parametrize("model_type", MODELS)
def test_a_converted_model_is_the_model(tmp_path: Path, model_type: str) -> None:
    """Random models of transformers, converted as llama.cpp does, give their tensors, and the same logits by config."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    architecture, sizes = MODELS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **(sizes if model_type == "gpt2" else LLAMA_SIZES | sizes))
    if model_type.startswith("gemma3"):
        config.query_pre_attn_scalar = 16  # The width of a head, as in all published models but one.
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    theirs = {name.format(i): ours.format(i) for ours, name in NAMES[architecture].items() for i in range(7)}
    tensors = {}
    for name, tensor in state.items():
        stem, _, suffix = name.rpartition(".")
        converted = as_llama_cpp_has_it(architecture, name, tensor.numpy(), config)
        tensors[f"{theirs[stem]}.{suffix}"] = np.ascontiguousarray(converted)
    metadata: dict[str, Any] = {}
    for key, names in KEYS.items():
        value = next((getattr(config, name) for name in names if name in config.to_dict()), None)
        metadata[f"{architecture}.{key}"] = value
    if model_type != "gpt2":
        rope = config.rope_parameters
        metadata[f"{architecture}.rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])

    weights = GGUFWeights(write(tmp_path / "x.gguf", tensors, metadata, architecture))
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        ours = weights.read(name)
        if model_type.startswith("gemma3") and name.endswith("norm.weight"):  # 1 was added to it, and taken away.
            np.testing.assert_allclose(ours, tensor.numpy(), rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(ours, tensor.numpy())

    again = transformers.AutoModelForCausalLM.from_config(type(config).from_dict(weights.config)).eval()
    again.load_state_dict(state, strict=False)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=0)


@pytest.mark.slow
def test_memory_is_that_of_the_result(smollm2_gguf: Path) -> None:
    """The 98 MB of the file are never in memory: the largest tensor is 113 MB, and reading all takes little besides."""
    program = """
import sys
from pathlib import Path
import gguf.quants
from gpt_jax.interop.gguf import GGUFWeights
from tests.memory import at_most
with at_most(113 + 50):
    weights = GGUFWeights(Path(sys.argv[1]))
    for name in weights.shapes:
        weights.read(name)
"""
    subprocess.run([sys.executable, "-c", program, smollm2_gguf], cwd=ROOT, check=True)


def refused(path: Path) -> str:
    """The line that opening the file gives."""
    with pytest.raises(UserError) as error:
        GGUFWeights(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "lacks llama.block_count in its metadata; convert the model again"),
        ({"block_count": "one"}, "has llama.block_count = 'one' in its metadata, which is not supported"),
        ({"block_count": 0}, "has llama.block_count = 0 in its metadata, which is not supported"),
        ({"attention.head_count_kv": [2, 4]}, "has llama.attention.head_count_kv = [2, 4] in its metadata, which is"),
        ({"expert_count": 8}, "is a mixture of experts, which is not supported"),
        ({"rope.dimension_count": 32}, "has llama.rope.dimension_count = 32; only 64 is supported"),
        ({"attention.value_length": 32}, "has llama.attention.value_length = 32; only 64 is supported"),
        (
            {"rope.scaling.type": "longrope"},
            "has rotary positions of type 'longrope'; supported are none, linear, yarn",
        ),
        ({"rope.scale_linear": 2.0}, "was made by an old converter (rope.scale_linear); convert the model again"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 0.1},
            "has settings of rotary positions that are not supported: yarn_log_multiplier",
        ),
        ({"rope.scaling.type": "linear"}, "lacks llama.rope.scaling.factor in its metadata; convert the model again"),
    ],
)
def test_a_model_that_is_not_supported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    metadata = METADATA | {f"llama.{key}": value for key, value in changes.items()}
    assert refused(write(tmp_path / "x.gguf", {"token_embd.weight": EMBEDDING}, metadata)).startswith(message)


def test_other_files_that_are_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    message = refused(write(path, {"token_embd.weight": EMBEDDING}, architecture="mamba"))
    assert message == "is of the architecture 'mamba'; supported are llama, qwen2, qwen3, gemma3, gpt2"
    message = refused(write(path, {"token_embd.weight": EMBEDDING}, METADATA | {"split.count": 3}))
    assert message == "is one of several parts; merge them with llama-gguf-split --merge"
    assert refused(write(path, {})) == "lacks the tensor token_embd.weight; convert the model again"
    tensors: dict[str, np.ndarray] = {
        "token_embd.weight": EMBEDDING.astype(np.int32),
        "blk.0.ffn_up.weight": np.zeros((2, 2), np.float64),
    }
    assert refused(write(path, tensors)) == (
        "has tensors of types that cannot be dequantised: token_embd.weight (I32), blk.0.ffn_up.weight (F64); take "
        "another quantisation of the model, such as Q8_0 or Q4_K_M"
    )


def test_a_tensor_of_no_known_name_keeps_its_own(tmp_path: Path) -> None:
    names = ["blk.0.ffn_gate_exps.weight", "blk.0.attn_sinks", "extra", "v.blk.0.attn_q.weight"]
    tensors = {"token_embd.weight": EMBEDDING} | {name: np.ones((2, 4), np.float32) for name in names}
    weights = GGUFWeights(write(tmp_path / "x.gguf", tensors))
    assert set(weights.shapes) == {"model.embed_tokens.weight", *names}
    assert all((weights.read(name) == 1).all() for name in names)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged or no GGUF file: it does not begin with GGUF"),
    "text": (b"<!DOCTYPE html>", "is damaged or no GGUF file: it does not begin with GGUF"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "only points to a file in Git LFS"),
    "old": (header(version=1), "is of version 1 of GGUF, not 2 or 3, or for big-endian machines"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(16), "is of version 50331648 of GGUF, not 2 or 3, or for big-endian"),
    "only magic": (b"GGUF\3\0\0\0", "is cut short"),
    "huge string": (header(2**63, b"x", fields=1), "is cut short"),
    "huge array": (header(1, b"x", struct.pack("<II", 9, 4), 2**62, fields=1), "is cut short"),
    "many fields": (header(fields=2**60), "is cut short"),
    "many tensors": (header(tensors=2**60), "is cut short"),
    "nested array": (header(1, b"x", struct.pack("<II", 9, 9), 1, fields=1), "its metadata has a value of type 9"),
    "type of value": (header(1, b"x", struct.pack("<I", 99), fields=1), "its metadata has a value of type 99"),
    "alignment": (
        header(17, b"general.alignment", struct.pack("<II", 4, 0), fields=1),
        "is damaged or no GGUF file: its alignment is 0",
    ),
    "dimensions": (header(tensor_entry(b"a", (1,) * 9), tensors=1), "tensor a has 9 dimensions"),
    "type of tensor": (header(tensor_entry(b"a", (32,), 99), tensors=1), "cannot be dequantised: a (type 99)"),
    "block": (header(tensor_entry(b"a", (33,), 2), tensors=1), "tensor a of shape (33,) is not made of blocks of 32"),
    "twice": (header(tensor_entry(b"a", (1,)) * 2, bytes(64), tensors=2), "it has two tensors a"),
    "beyond": (header(tensor_entry(b"a", (2**40,)), bytes(64), tensors=1), "is cut short"),
    "elsewhere": (
        header(tensor_entry(b"a", (1,), start=2**40), bytes(64), tensors=1),
        "tensor a begins at byte 1099511627776 of the data, not 0",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert message in refused(path)


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"token_embd.weight": EMBEDDING[:, :32]}, METADATA | {"list": ["a", "b"]})
    whole = path.read_bytes()
    weights = GGUFWeights(path)
    for length in range(8, len(whole)):
        path.write_bytes(whole[:length])
        assert refused(path) == "is cut short; copy or download it again"
    with pytest.raises(UserError, match=r"x\.gguf is cut short; copy or download it again$"):
        weights.read("model.embed_tokens.weight")
    path.unlink()
    assert refused(path) == "cannot be read (No such file or directory)"


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", {"token_embd.weight": EMBEDDING})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UserError, match=r"^reading GGUF files needs the package gguf: pip install 'gpt-jax\[interop\]'$"
    ):
        GGUFWeights(path)
