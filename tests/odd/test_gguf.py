"""What strangers write into GGUF files is read as llama.cpp reads it, or refused in one line, at once."""

import contextlib
import json
import os
import struct
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.interop.gguf import NAMES, ROPE_FACTORS, GGUFWeights
from gpt_jax.model.rope import frequencies
from gpt_jax.run.load import open_source
from tests.interop.gguf_files import header, tensor_entry, write
from tests.memory import at_most

gguf = pytest.importorskip("gguf")

HUGE = 2_000_000_000
D, HEADS, KV_HEADS, FF, VOCAB, CONTEXT = 32, 4, 2, 48, 40, 64
METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": CONTEXT,
    "embedding_length": D,
    "feed_forward_length": FF,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
}
SHAPES = {
    "token_embd": (VOCAB, D),
    "blk.{}.attn_norm": (D,),
    "blk.{}.attn_q": (D, D),
    "blk.{}.attn_k": (D // HEADS * KV_HEADS, D),
    "blk.{}.attn_v": (D // HEADS * KV_HEADS, D),
    "blk.{}.attn_output": (D, D),
    "blk.{}.ffn_norm": (D,),
    "blk.{}.ffn_gate": (FF, D),
    "blk.{}.ffn_up": (FF, D),
    "blk.{}.ffn_down": (D, FF),
    "output_norm": (D,),
}
TENSORS = {
    f"{name.format(i)}.weight": np.zeros(shape, np.float32)
    for name, shape in SHAPES.items()
    for i in range(2 if "{}" in name else 1)
}


def model(path: Path, changes: dict[str, Any], tensors: dict[str, Any] = TENSORS, architecture: str = "llama") -> Path:
    """A file with a model. changes: of the metadata; keys with a colon stand for themselves."""
    fields = {
        key.lstrip(":") if key[0] == ":" else f"{architecture}.{key}": v for key, v in (METADATA | changes).items()
    }
    return write(path, tensors, fields, architecture)


def check(path: Path) -> Any:
    """What a command does with a model before it loads the parameters, and the frequencies of its positions."""
    source = open_source(str(path))
    source.check()
    config = source.config
    assert np.isfinite(frequencies(config, False)[0]).all()
    return config


def refusal(path: Path) -> str:
    """The one line that opening the model gives, with little memory."""
    with at_most(megabytes=50), pytest.raises(UserError) as error:
        check(path)
    told = str(error.value)
    assert str(path) in told
    assert "\n" not in told
    assert len(told) < 4000
    return told


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + values


CUT = "is cut short; copy or download it again"
U64 = 2**64 - 1
FILES: dict[str, tuple[bytes, str]] = {
    "small letters": (b"gguf" + header()[4:], "it does not begin with GGUF"),
    "the older format": (b"GGML" + header()[4:], "it does not begin with GGUF"),
    "version 0": (header(version=0), "is of version 0 of GGUF, not 2 or 3"),
    "version 4": (header(version=4), "is of version 4 of GGUF, not 2 or 3"),
    "2**64 - 1 tensors": (header(tensors=U64), CUT),
    "2**64 - 1 fields": (header(fields=U64), CUT),
    "65,537 tensors": (header(bytes(24 * 65537), tensors=65537), "it claims 65537 tensors and 0 fields of metadata"),
    "65,537 fields": (header(bytes(13 * 65537), fields=65537), "it claims 0 tensors and 65537 fields of metadata"),
    "fields of zeros": (header(bytes(13 * 60000), fields=60000), "it has two fields ''"),
    "a field twice": (header(field(b"a", 0, b"\1") * 2, fields=2), "it has two fields 'a'"),
    "a key of 2**64 - 1 bytes": (header(U64, b"a", fields=1), CUT),
    "a key of 65,536 bytes": (
        header(field(b"a" * 65536, 0, b"\1"), fields=1),
        "the name of a field is longer than 65535 bytes",
    ),
    "a string of 2**63 bytes": (header(field(b"a", 8, struct.pack("<Q", 2**63)), fields=1), CUT),
    "an array of 2**64 - 1 numbers": (header(field(b"a", 9, array(4, U64)), fields=1), CUT),
    "an array of 2**61 strings": (header(field(b"a", 9, array(8, 2**61)), fields=1), CUT),
    "an array of strings of zeros": (
        header(field(b"a", 9, array(8, 60, bytes(8 * 60))), fields=2),
        CUT,
    ),
    "9,000,000 flags": (
        header(field(b"a", 9, array(7, 9_000_000, bytes(9_000_000))), fields=1),
        "its metadata has arrays of 9000000 values",
    ),
    "an array of arrays": (header(field(b"a", 9, array(9, 1, array(4, 1, bytes(4)))), fields=1), "a value of type 9"),
    "an array of a kind that is none": (header(field(b"a", 9, array(13, 1)), fields=1), "a value of type 13"),
    "a value of a kind that is none": (header(field(b"a", 2**32 - 1, b""), fields=1), "a value of type 4294967295"),
    "an alignment of 0": (header(field(b"general.alignment", 4, bytes(4)), fields=1), "its alignment is 0"),
    "an alignment of 24": (
        header(field(b"general.alignment", 4, struct.pack("<I", 24)), fields=1),
        "its alignment is 24",
    ),
    "an alignment in words": (
        header(field(b"general.alignment", 8, struct.pack("<Q", 2) + b"32"), fields=1),
        "its alignment is '32'",
    ),
    "an alignment that is true": (header(field(b"general.alignment", 7, b"\1"), fields=1), "its alignment is True"),
    "an alignment of 2**31": (
        header(
            field(b"general.alignment", 4, struct.pack("<I", 2**31)),
            tensor_entry(b"a", (1,)),
            bytes(99),
            tensors=1,
            fields=1,
        ),
        CUT,
    ),
    "a name of 65 bytes": (
        header(tensor_entry(b"a" * 65, (1,)), bytes(64), tensors=1),
        "the name of a tensor is longer than 64 bytes",
    ),
    "no dimensions": (
        header(tensor_entry(b"a", ()), bytes(64), tensors=1),
        "tensor a of shape () is not made of blocks",
    ),
    "five dimensions": (header(tensor_entry(b"a", (1,) * 5), bytes(64), tensors=1), "tensor a has 5 dimensions"),
    "2**32 - 1 dimensions": (
        header(struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**32 - 1), bytes(64), tensors=1),
        "tensor a has 4294967295 dimensions",
    ),
    "a product of 0 in 64 bits": (header(tensor_entry(b"a", (2**32, 2**32)), bytes(64), tensors=1), CUT),
    "a product of 8 in 64 bits": (header(tensor_entry(b"a", (2**62 + 2, 4)), bytes(64), tensors=1), CUT),
    "dimensions of 2**64 - 1": (header(tensor_entry(b"a", (U64,) * 4), bytes(64), tensors=1), CUT),
    "the same bytes twice": (
        header(tensor_entry(b"a", (8,)), tensor_entry(b"b", (8,)), bytes(99), tensors=2),
        "tensor b begins at byte 0 of the data, not 32",
    ),
    "a part of another tensor": (
        header(tensor_entry(b"a", (16,)), tensor_entry(b"b", (8,), start=32), bytes(199), tensors=2),
        "tensor b begins at byte 32 of the data, not 64",
    ),
    "a gap": (
        header(tensor_entry(b"a", (8,)), tensor_entry(b"b", (8,), start=64), bytes(199), tensors=2),
        "tensor b begins at byte 64 of the data, not 32",
    ),
    "not aligned": (
        header(tensor_entry(b"a", (1,)), tensor_entry(b"b", (8,), start=4), bytes(199), tensors=2),
        "tensor b begins at byte 4 of the data, not 32",
    ),
    "an offset of 2**64 - 1": (
        header(tensor_entry(b"a", (1,), start=U64), bytes(64), tensors=1),
        "tensor a begins at byte",
    ),
    "a type that is none": (
        header(tensor_entry(b"a", (32,), 2**32 - 1), tensors=1),
        "a (type 4294967295); take another",
    ),
    "a type that was removed": (header(tensor_entry(b"a", (32,), 4), tensors=1), "a (type 4); take another"),
    "whole numbers": (header(tensor_entry(b"a", (32,), 26), tensors=1), "a (I32); take another"),
    "part of a block": (
        header(tensor_entry(b"a", (31,), 8), tensors=1),
        "tensor a of shape (31,) is not made of blocks of 32",
    ),
    "no architecture": (header(), "is of the architecture ''; supported are llama"),
    "an architecture that is a number": (
        header(field(b"general.architecture", 4, bytes(4)), fields=1),
        "is of the architecture 0; supported are llama",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_refused(tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with at_most(megabytes=50), pytest.raises(UserError) as error:
        GGUFWeights(path)
    told = str(error.value)
    assert told.startswith(f"{path} ")
    assert message in told
    assert "\n" not in told


def without(*names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"block_count": HUGE}, TENSORS, "num_hidden_layers = 2000000000, but the tensors there are of 2 layers"),
    ({"block_count": 2**32 - 1}, TENSORS, "num_hidden_layers = 4294967295, but the tensors there are of 2 layers"),
    ({"block_count": 3}, TENSORS, "num_hidden_layers = 3, but the tensors there are of 2 layers"),
    ({"block_count": 1}, TENSORS, "not known: model.layers.1."),
    ({"block_count": 2.0}, TENSORS, "has llama.block_count = 2.0 in its metadata, which is not supported"),
    ({"block_count": True}, TENSORS, "has llama.block_count = True in its metadata, which is not supported"),
    ({"attention.head_count": HUGE}, TENSORS, "model.d_head"),
    ({"attention.head_count": 0}, TENSORS, "has llama.attention.head_count = 0 in its metadata"),
    (
        {"attention.head_count": 3},
        TENSORS,
        "model.n_kv_head = 2 is not possible: it must be a divisor of model.n_head = 3",
    ),
    ({"attention.head_count": 8}, TENSORS, "model.layers.0.self_attn.k_proj.weight (16, 32), not (8, 32)"),
    (
        {"attention.head_count_kv": 3},
        TENSORS,
        "model.n_kv_head = 3 is not possible: it must be a divisor of model.n_head",
    ),
    ({"attention.head_count_kv": [2, 4]}, TENSORS, "has llama.attention.head_count_kv = [2, 4] in its metadata"),
    ({"attention.key_length": HUGE}, TENSORS, "head_dim = 2000000000, but no tensor there has more than 1536 numbers"),
    ({"attention.key_length": 7}, TENSORS, "model.d_head = 7 is not possible: it must be even, with rotary positions"),
    ({"attention.key_length": 10}, TENSORS, "model.layers.0.self_attn.q_proj.weight (32, 32), not (40, 32)"),
    ({"attention.value_length": 16}, TENSORS, "has llama.attention.value_length = 16; only 8 is supported"),
    ({"rope.dimension_count": 4}, TENSORS, "has llama.rope.dimension_count = 4; only 8 is supported"),
    ({"embedding_length": HUGE}, TENSORS, "but no tensor there has more than 1536 numbers"),
    ({"embedding_length": 64, "attention.key_length": 8}, TENSORS, "model.norm.weight (32,), not (64,)"),
    ({"feed_forward_length": HUGE}, TENSORS, "intermediate_size = 2000000000, but no tensor there has more than 1536"),
    ({"feed_forward_length": 47}, TENSORS, "model.layers.0.mlp.gate_proj.weight (48, 32), not (47, 32)"),
    (
        {"context_length": 2**31},
        TENSORS,
        "model.context_length = 2147483648 is not possible: it must be less than 2**31",
    ),
    ({"context_length": 0}, TENSORS, "has llama.context_length = 0 in its metadata, which is not supported"),
    ({"rope.freq_base": float("inf")}, TENSORS, "model.rope.theta = inf is not possible"),
    (
        {"rope.freq_base": float("nan")},
        TENSORS,
        "has llama.rope.freq_base = nan in its metadata, which is not supported",
    ),
    ({"rope.freq_base": 0.0}, TENSORS, "has llama.rope.freq_base = 0.0 in its metadata, which is not supported"),
    ({"attention.layer_norm_rms_epsilon": float("inf")}, TENSORS, "model.norm_eps = inf is not possible"),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": float("inf")}, TENSORS, "model.rope.factor = inf is not"),
    (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0},
        TENSORS,
        "has llama.rope.scaling.factor = 0.0 in its",
    ),
    ({"rope.scaling.type": 5}, TENSORS, "has rotary positions of type 5; supported are none, linear, yarn"),
    (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        TENSORS | {ROPE_FACTORS: np.full(4, 2, np.float32)},
        "scales rotary positions twice, by rope_freqs.weight and by rope.scaling.type",
    ),
    ({}, TENSORS | {ROPE_FACTORS: np.full(4, 2, np.float32)}, "has rotary positions that are not scaled as Llama 3's"),
    ({}, TENSORS | {ROPE_FACTORS: np.full(4, np.nan, np.float32)}, "has numbers that are not finite (nan or infinity)"),
    ({"attention.causal": False}, TENSORS, "is a model whose tokens see those after them, which is not supported"),
    ({"expert_count": 8}, TENSORS, "is a mixture of experts, which is not supported"),
    ({":split.count": 2}, TENSORS, "is one of several parts; merge them with llama-gguf-split --merge"),
    ({}, without("output_norm.weight"), "missing: model.norm.weight"),
    ({}, without("token_embd.weight"), "lacks the tensor token_embd.weight; convert the model again"),
    ({}, TENSORS | {"blk.0.attn_sinks": np.zeros(4, np.float32)}, "not known: blk.0.attn_sinks"),
    ({}, TENSORS | {"blk.1.attn_q.bias": np.zeros(D, np.float32)}, "not known: model.layers.1.self_attn.q_proj.bias"),
    ({}, TENSORS | {"output.weight": np.zeros((VOCAB + 1, D), np.float32)}, "lm_head.weight (41, 32), not (40, 32)"),
    ({}, TENSORS | {"output_norm.weight": np.zeros((1, D), np.float32)}, "model.norm.weight (1, 32), not (32,)"),
]


@pytest.mark.parametrize(("changes", "tensors", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_model_that_is_refused(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    assert message in refusal(model(tmp_path / "x.gguf", changes, tensors))


WORDS = [f"w{i}" for i in range(VOCAB)]
# Changes, the values that the configuration has then, and the lines that are told.
COUNTS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = [
    ("llama", {}, TENSORS, {"vocab_size": VOCAB, "tied_head": True, "head_dim": 8, "kv_heads": 2}, []),
    ("llama", {"vocab_size": VOCAB, ":tokenizer.ggml.tokens": WORDS}, TENSORS, {"vocab_size": VOCAB}, []),
    (
        "llama",
        {"vocab_size": 41},
        TENSORS,
        {"vocab_size": VOCAB},
        ["the embeddings' 40 rows count, not llama.vocab_size = 41"],
    ),
    (
        "llama",
        {":tokenizer.ggml.tokens": WORDS[:33]},
        TENSORS,
        {"vocab_size": VOCAB},
        ["the embeddings have 40 rows, and the vocabulary 33 tokens; the rest is padding"],
    ),
    ("llama", {}, TENSORS | {"output.weight": np.ones((VOCAB, D), np.float32)}, {"tied_head": False}, []),
    ("llama", {}, TENSORS | {"output.weight": TENSORS["token_embd.weight"]}, {"tied_head": False}, []),
    ("llama", {"context_length": 2**31 - 1}, TENSORS, {"context_length": 2**31 - 1}, []),
    ("llama", {":general.name": "x", ":some.thing": [1.5], "odd.key": 3}, TENSORS, {"n_layer": 2}, []),
    ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, TENSORS, {"n_layer": 2}, []),
    ("llama", {}, TENSORS | {ROPE_FACTORS: np.ones(4, np.float32)}, {"n_layer": 2}, []),
    ("llama", {"attention.sliding_window": 8}, TENSORS, {"window": 8}, []),
    (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 16},
        TENSORS,
        {"context_length": CONTEXT},
        ["factor = 2.0 counts, not the context over original_max_position_embeddings = 4.0"],
    ),
    (
        "qwen2",
        {"attention.sliding_window": 8},
        TENSORS
        | {
            f"blk.{i}.attn_{part}.bias": np.zeros(len(TENSORS[f"blk.{i}.attn_{part}.weight"]), np.float32)
            for i in range(2)
            for part in "qkv"
        },
        {"window": 0},
        ["qwen2.attention.sliding_window is not used, as in llama.cpp"],
    ),
]


@pytest.mark.parametrize(("architecture", "changes", "tensors", "values", "told"), COUNTS, ids=lambda v: str(v)[:50])
def test_which_place_counts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    changes: dict[str, Any],
    tensors: dict[str, Any],
    values: dict[str, Any],
    told: list[str],
) -> None:
    path = model(tmp_path / "x.gguf", changes, tensors, architecture)
    config = check(path)
    assert {name: getattr(config, name) for name in values} == values
    assert capsys.readouterr().err.splitlines() == [f"{path}: {line}" for line in told]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F16", "BF16"])
def test_a_scale_that_is_nan(tmp_path: Path, name: str) -> None:
    """Bytes of ones are nan in each of these types, as the scale of a block or as the number itself."""
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = np.full((2, 256 // block * block_bytes), 255, np.uint8)
    path = write(
        tmp_path / "x.gguf",
        {"token_embd.weight": stored, **without("token_embd.weight")},
        types={"token_embd.weight": kind},
    )
    with pytest.raises(UserError, match=rf"^tensor token_embd.weight in {path} has numbers that are not finite"):
        GGUFWeights(path).read("model.embed_tokens.weight")


def test_files_of_zeros_end_within_seconds(tmp_path: Path) -> None:
    """Large files, which claim as much as their bytes can hold, take little memory and time, in all three formats."""
    (tmp_path / "fields.gguf").write_bytes(header(bytes(2**26), fields=65536))
    (tmp_path / "strings.gguf").write_bytes(header(field(b"a", 9, array(8, 2**20, bytes(2**24))), fields=1))
    for name, content in [
        ("numbers", b'{"a":[' + b"0," * 2**22 + b"0]}"),
        ("lists", b'{"a":' + b"[" * 2**22 + b"]" * 2**22 + b"}"),
        ("entries", b"{" + b",".join(b'"%x":0' % i for i in range(2**20)) + b"}"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "layers").mkdir()
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    content = json.dumps({f"model.layers.{i}.x": entry for i in range(20_000)}).encode()
    (tmp_path / "layers" / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    (tmp_path / "layers" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 20000}')
    for path in sorted(tmp_path.iterdir()):
        start = time.process_time()
        with at_most(megabytes=500), pytest.raises(UserError) as error:
            check(path)
        assert "\n" not in str(error.value)
        assert time.process_time() - start < 20, path


@st.composite
def files(draw: st.DrawFn, whole: bytes, header_bytes: int) -> bytes:
    """A valid file with other bytes in its header, or other lengths and counts, or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, header_bytes))
        other = draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([bytes(8), b"\xff" * 8, struct.pack("<Q", 2**62)])
        )
        content[place : place + draw(st.sampled_from([0, len(other)]))] = other
    return bytes(content[: draw(st.integers(0, len(content)))]) if draw(st.integers(0, 9)) == 0 else bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    words = {":tokenizer.ggml.tokens": WORDS, ":tokenizer.ggml.scores": [0.5] * VOCAB, ":general.alignment": 32}
    return model(path, words).read_bytes()


@settings(max_examples=250, deadline=timedelta(seconds=20))
@given(data=st.data())
def test_any_file(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A model, or one line; never a traceback, never more than a few seconds and megabytes."""
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(data.draw(files(whole, whole.index(b"output_norm.weight") + 60)))
    with at_most(megabytes=100), contextlib.suppress(UserError):
        check(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"x\.gguf is no folder of a published model"):
        open_source(str(tmp_path / "x.gguf"))


def test_every_tensor_of_the_model_is_here() -> None:
    assert {name for name in NAMES["llama"] if name != "output"} == set(SHAPES)
