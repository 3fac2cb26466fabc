import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.api import Model
from gpt_jax.cli.parse import given_fields
from gpt_jax.config import Config, DataConfig, LoraConfig, ModelConfig, RopeConfig, RopeScalingName
from gpt_jax.data.folders import DataFolders
from gpt_jax.errors import UserError
from gpt_jax.interop.families import family_for
from gpt_jax.interop.load import aligned, check_tokenizer, load_params, open_named, their_config
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.rope import frequencies, plain
from gpt_jax.placement import Placement
from gpt_jax.run.load import LoadedModel, adopt, load_model, open_source
from gpt_jax.sample.generate import generate, generate_tokens
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.storage.files import save_json
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.train.setup import set_up, start_from
from tests import published, tiny
from tests.commands import refused, refused_here, run_here
from tests.interop.models import LLAMA, publish

GPT2 = dataclasses.replace(tiny.GPT2, attention="xla")
DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, publish(folder)


def copied(folder: Path, to: Path, **settings: Any) -> Path:
    """A copy of a published model, with other settings in its config.json."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    save_json(to / "config.json", config | settings)
    return to


def logits(model: GPT, params: Params, tokens: jax.Array) -> np.ndarray:
    @jax.jit
    def compute(params: Params) -> jax.Array:
        return jax.vmap(lambda hidden: logits_NV(model, params, hidden))(forward(model, params, tokens))

    return np.asarray(compute(params))[..., :261]


def test_the_vocabulary_is_padded_with_zeros(llama: tuple[Path, Params]) -> None:
    folder, original = llama
    model, params, tokenizer = load_model(open_source(str(folder)))
    assert model.config.embedding_rows == 384
    assert model.config.vocab_size == tokenizer.vocab_size == 261
    for name in ("tokens_VD", "head_VD"):
        np.testing.assert_array_equal(params[name][:261], original[name])
        assert not np.any(params[name][261:])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 261, (2, 32)))
    np.testing.assert_allclose(logits(model, params, tokens), logits(GPT(LLAMA), original, tokens), atol=1e-5, rtol=0)


def test_parameters_are_placed_as_they_are_wanted(llama: tuple[Path, Params]) -> None:
    """On all eight devices, the same bits on each."""
    folder, original = llama
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = load_params(open_named(str(folder)), LLAMA, lambda tree: jax.tree.map(lambda _: everywhere, tree))
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(original), strict=True):
        assert len(ours.addressable_shards) == 8
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected)


def test_one_cpu_device_takes_the_memory_that_was_read_into() -> None:
    """No copy: else an import would need a leaf's memory twice."""
    array = aligned((64, 64))
    array[...] = 1
    placed = jax.device_put(array, jax.sharding.SingleDeviceSharding(DEVICE))
    assert placed.unsafe_buffer_pointer() == array.ctypes.data


def test_a_shorter_context_crops_learned_positions(tmp_path: Path) -> None:
    original = publish(tmp_path, GPT2)
    model, params, _ = load_model(open_source(str(tmp_path)), 8, cache_dtype="int8")
    assert model.config.cache_dtype == "int8"
    assert params["positions_TD"].shape == (8, 32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 261, (2, 8)))
    np.testing.assert_allclose(logits(model, params, tokens), logits(GPT(GPT2), original, tokens), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="at most 32"):
        load_model(open_source(str(tmp_path)), 33)


def test_a_longer_context_where_positions_rotate(llama: tuple[Path, Params]) -> None:
    model, params, _ = load_model(open_source(str(llama[0])), 100)
    tokens = jnp.zeros((1, 100), jnp.int32)
    assert np.all(np.isfinite(logits(model, params, tokens)))


def test_dynamic_scaling_depends_on_the_context(llama: tuple[Path, Params], tmp_path: Path) -> None:
    """Within the original context it is no scaling; twice as long, the base grows as the formula says."""
    folder = copied(llama[0], tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rope_parameters=None)
    config = their_config(open_named(str(folder)))
    assert config.rope.original_context == 32
    np.testing.assert_allclose(frequencies(config, False)[0], plain(10_000.0, 8))
    longer = dataclasses.replace(config, context_length=64)
    np.testing.assert_allclose(frequencies(longer, False)[0], plain(10_000.0 * 3 ** (8 / 6), 8))


def test_training_keeps_its_own_settings(llama: tuple[Path, Params]) -> None:
    """The architecture is the published model's; dropout, adapters and how it runs are the configuration's."""
    wanted = ModelConfig(context_length=16, dropout=0.1, remat="full", lora=LoraConfig(rank=2), n_layer=7)
    config = adopt(open_source(str(llama[0])), wanted)
    assert (config.n_layer, config.n_kv_head, config.positions) == (2, 2, "rotary")
    assert (config.context_length, config.dropout, config.remat, config.lora.rank) == (16, 0.1, "full", 2)
    assert adopt(open_source(str(llama[0])), ModelConfig(), asks_context=False).context_length == 32
    assert adopt(open_source(str(llama[0])), ModelConfig()).context_length == 1024


@pytest.mark.parametrize(("flags", "context"), [([], 32), (["--model.context-length=1024"], 1024)], ids=str)
def test_a_flag_with_the_default_context_counts(llama: tuple[Path, Params], flags: list[str], context: int) -> None:
    assert start_from(Config(init_from=str(llama[0])), given_fields(flags))[0].model.context_length == context


def test_wrong_tensors_are_named_all_at_once(llama: tuple[Path, Params], tmp_path: Path) -> None:
    """Before anything is allocated."""
    folder = copied(llama[0], tmp_path, intermediate_size=47, tie_word_embeddings=True)
    tensors = (folder / "model.safetensors").read_bytes().replace(b"model.norm.weight", b"model.name.weight")
    (folder / "model.safetensors").write_bytes(tensors)
    with pytest.raises(UserError) as caught:
        load_params(open_named(str(folder)), LLAMA, Placement([DEVICE]).state_shardings)
    message = str(caught.value)
    assert "missing: model.norm.weight; not known: model.name.weight; of another shape: " in message
    assert "model.layers.0.mlp.gate_proj.weight (48, 32), not (47, 32)" in message
    assert "lm_head" not in message  # A tied head may be stored, too.
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "mamba"}, "models of type 'mamba' are not supported; supported are gpt2, llama"),
        ({"hidden_act": "xielu"}, "hidden_act = 'xielu' is not known"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary positions of type 'longrope' are not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "model.n_kv_head = 3 is not possible: it must be a divisor of model.n_head = 4"),
        ({"hidden_size": "wide"}, "must be of type int"),
        ({"vocab_size": 200}, "the tokenizer has 261 tokens and the model only 200"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        ({"model_type": ["llama"]}, "are not supported"),
        ({"hidden_act": ["silu"]}, "no llama's"),
        ({"num_hidden_layers": None}, "model.n_layer = 0 is not possible"),
        ({"rope_parameters": [1]}, "no llama's"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "a"}}, "no llama's"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": "a"}}, "no llama's"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1}}, "model.rope.theta = 1.0 is not possible"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "model.rope.high_freq_factor = 4.0 is not possible: it must be more than model.rope.low_freq_factor = 4.0",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2},
            "model.d_head = 2 is not possible: it must be more than 2",
        ),
        ({"vocab_size": 2**62}, "model.vocab_size = 4611686018427387904 is not possible"),
        ({"intermediate_size": 2**62}, "model.d_ff = 4611686018427387904 is not possible"),
        (
            {"hidden_size": 2**30, "vocab_size": 2**30, "intermediate_size": 2**30},
            "vocab_size = 1073741824, but no tensor there",
        ),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000, but the tensors there are of 2 layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["odd"] * 2}, "no qwen2's"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "no gemma3_text's"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported(
    llama: tuple[Path, Params], tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    folder = copied(llama[0], tmp_path, **settings)
    with pytest.raises(UserError) as caught:
        load_model(open_source(str(folder)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yarn_without_a_factor_is_the_ratio_of_the_contexts(llama: tuple[Path, Params], tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 8}
    folder = copied(llama[0], tmp_path, rope_parameters=rope)
    assert their_config(open_named(str(folder))).rope.factor == 4.0


@pytest.mark.parametrize("changes", [{"n_layer": 3}, {"n_layer": 1}, {"d_ff": 64}, {"norm_eps": 1e-3}], ids=str)
def test_another_architecture_than_the_files_have_is_refused(
    llama: tuple[Path, Params], changes: dict[str, Any]
) -> None:
    """As when a run goes on with adapters, and its model was replaced by another one."""
    config = dataclasses.replace(LLAMA, **changes)
    with pytest.raises(UserError, match=rf"model\.{next(iter(changes))} is .* there and .* here"):
        load_params(open_named(str(llama[0])), config, Placement([DEVICE]).state_shardings)


def test_equal_models_have_equal_architectures() -> None:
    """However they were written."""
    scaled = RopeConfig(scaling="yarn", factor=2.0)
    for one, other in [
        (replaced(rope=scaled), replaced(rope=dataclasses.replace(scaled, original_context=32, low_freq_factor=9.0))),
        (replaced(rope=RopeConfig(beta_fast=7.0)), LLAMA),
        (replaced(rope=RopeConfig(local_theta=7.0)), LLAMA),
        (replaced(window=8, rope=RopeConfig(local_theta=10_000.0)), replaced(window=8)),
        (replaced(window=8, window_pattern="sf"), replaced(window=8, window_pattern="sfsf")),
        (replaced(window=8, window_pattern="f"), LLAMA),
        (replaced(d_head=8, query_scale=8**-0.5, dropout=0.5), LLAMA),
    ]:
        assert one.architecture() == other.architecture()
    assert replaced(window=8).architecture() != LLAMA.architecture()
    assert replaced(rope=scaled).architecture() != LLAMA.architecture()


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_sliding_layers_that_are_stretched_are_not_those_that_are_not(scaling: RopeScalingName) -> None:
    stretched = replaced(window=8, rope=RopeConfig(scaling=scaling, factor=2.0))
    plain_ones = replaced(window=8, rope=RopeConfig(scaling=scaling, factor=2.0, local_theta=10_000.0))
    assert not np.allclose(frequencies(stretched, True)[0], frequencies(plain_ones, True)[0])
    assert stretched.architecture() != plain_ones.architecture()


@pytest.mark.parametrize("changes", [{}, {"window": 8}], ids=["llama", "mistral"])
def test_dynamic_scaling_can_be_exported_at_any_context(changes: dict[str, Any]) -> None:
    """As a larger theta, for sliding layers too."""
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_context=32)
    longer = replaced(context_length=64, rope=rope, **changes)
    family = family_for(longer)
    assert family is not None
    again = family.to_config(family.to_settings(longer), "")
    for sliding in (False, True):
        np.testing.assert_allclose(frequencies(again, sliding)[0], frequencies(longer, sliding)[0])


def replaced(**changes: Any) -> ModelConfig:
    return dataclasses.replace(LLAMA, **changes)


IMAGE = "<image_soft_token>"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}" + IMAGE + "{% endif %}{% endfor %}"


def with_more_tokens(llama: tuple[Path, Params], to: Path, special: bool = True, **settings: Any) -> Path:
    """A copy of the model whose tokenizer has one token more than the embeddings have rows, as Gemma 3's has."""
    from tokenizers import AddedToken, Tokenizer

    folder = copied(llama[0], to)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(IMAGE, special=special, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    save_json(path, {**json.loads(path.read_text()), "chat_template": TEMPLATE} | settings)
    return folder


def test_a_tokenizer_with_a_special_token_more(llama: tuple[Path, Params], tmp_path: Path) -> None:
    """As Gemma 3's own folders have it. It is never fed, never drawn, and a conversation that would need it is told."""
    folder = with_more_tokens(llama, tmp_path)
    model, params, tokenizer = load_model(open_source(str(folder)))
    assert (tokenizer.vocab_size, model.config.vocab_size) == (262, 261)
    text = f"a {IMAGE} b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < 261
    settings = Settings(max_new_tokens=4, filters=Filters(temperature=1e6))
    [result] = generate(model, params, tokenizer, [text[:3]], settings)
    assert max(result.tokens) < 261
    hello = tokenizer.encode_chat([{"role": "user", "content": "a <"}])
    assert generate_tokens(model, params, tokenizer, [hello], settings) == [result]
    system = tokenizer.encode_chat([{"role": "system", "content": "hello"}])
    with pytest.raises(UserError, match=rf"^the model knows 261 tokens, and {IMAGE} is none of them; leave it out$"):
        generate_tokens(model, params, tokenizer, [system], Settings(max_new_tokens=1))
    with pytest.raises(UserError, match=r"^the model knows 261 tokens, and 262, -1 is none of them"):
        Model(LoadedModel(model, params, tokenizer)).logits([1, 262, -1])


def test_training_from_a_model_whose_tokenizer_has_more(llama: tuple[Path, Params], tmp_path: Path) -> None:
    folder = with_more_tokens(llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text(f"one {IMAGE} text\n" * 20)
    config = Config(
        init_from=str(folder), data=DataConfig(dir=str(tmp_path / "data"), source=(str(tmp_path / "text.txt"),))
    )
    config, data = set_up(config, {"data.source", "data.dir"})
    assert config.model.vocab_size == 261
    assert data.tokenizer.vocab_size == 262
    assert isinstance(data, DataFolders)
    [folder_data] = data.by_name.values()
    assert folder_data.train.read(0, len(folder_data.train)).max() < 261


@pytest.mark.parametrize(
    "changes",
    [{"special": False}, {"add_bos_token": True, "bos_token": IMAGE}, {"eos_token": IMAGE}],
    ids=["a token of texts", "begins a text", "ends a text"],
)
def test_tokens_that_texts_need_must_be_known(
    llama: tuple[Path, Params], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = with_more_tokens(llama, tmp_path, **changes)
    with pytest.raises(UserError, match="the tokenizer has 262 tokens and the model only 261; they do not belong"):
        open_source(str(folder)).tokenizer()


def test_the_first_llama_2_has_a_pad_more(tmp_path: Path) -> None:
    """In an added_tokens.json."""
    shutil.copytree(published.llama(), tmp_path, dirs_exist_ok=True)
    save_json(tmp_path / "added_tokens.json", {"[PAD]": 1000})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1001
    check_tokenizer(tokenizer, dataclasses.replace(LLAMA, vocab_size=1000), "")
    with pytest.raises(UserError, match="they do not belong together"):
        check_tokenizer(tokenizer, dataclasses.replace(LLAMA, vocab_size=999), "")


def test_rows_that_no_token_has_are_never_drawn() -> None:
    """Embeddings are often padded; here the padding, of the files and of ours, is far likelier than all tokens."""
    config = dataclasses.replace(tiny.ONE_LAYER, vocab_multiple=128, tied_head=False)
    params = tiny.uneven_params(config)
    n_tokens = 200  # Of the tokenizer; the model has 261, in 384 rows.
    params = {**params, "head_VD": params["head_VD"].at[n_tokens:].set(1000 * params["head_VD"][:1])}
    settings = Settings(max_new_tokens=6, filters=Filters(temperature=1e6, repetition_penalty=1.5))
    for result in generate(GPT(config), params, SmallerTokenizer(n_tokens), ["a", "b"], settings):
        assert len(result.tokens) == 6
        assert max(result.tokens) < n_tokens


class SmallerTokenizer(ByteTokenizer):
    """Of fewer tokens than the model has rows."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset()


def test_weights_that_are_nan_are_refused_by_every_command(llama: tuple[Path, Params], tmp_path: Path) -> None:
    """Before anything is compiled, and without a word of output."""
    folder = copied(llama[0], tmp_path / "model")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : (start := 8 + int.from_bytes(content[:8], "little"))])
    place = start + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0] + 4 * 33
    content[place : place + 4] = np.float32("nan").tobytes()
    path.write_bytes(content)
    (tmp_path / "text.txt").write_text("some text")
    told = (
        f"error: tensor model.layers.1.mlp.up_proj.weight in {path} has numbers that are not finite (nan or infinity)"
    )
    for command in (["sample"], ["sample", "--json"], ["sample", "--chat"], ["eval", "--text", tmp_path / "text.txt"]):
        out, err = run_here(*command, "--model", folder, status=1)
        assert out == ""
        assert err.startswith(told)
        assert err.count("\n") == 1


def test_bad_folders_end_in_one_line(llama: tuple[Path, Params], tmp_path: Path) -> None:
    """As a user meets them: each a line, and a status that is not 0."""
    sample = ["sample", "--prompt", "a", "--model"]
    cut = copied(llama[0], tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-100])
    assert "model.safetensors" in refused(*sample, cut)
    (cut / "model.safetensors").unlink()
    assert "safetensors" in refused_here(*sample, cut)
    (cut / "config.json").write_text("{")
    assert "config.json" in refused_here(*sample, cut)
    assert "no config.json" in refused_here(*sample, tmp_path)
    assert "no folder or file" in refused_here(*sample, tmp_path / "nothing")
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(100))
    assert "x.gguf" in refused_here(*sample, tmp_path / "x.gguf")
    assert "use one of them" in refused_here(*sample, llama[0], "--run", tmp_path)
