import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import AttentionName, DTypeName, LoraConfig, ModelConfig, RematName
from gpt_jax.model.cache import init_cache
from gpt_jax.model.forward import forward, forward_cached, init_params
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import head_VD, logits_NV
from gpt_jax.model.loss import nats_in_chunks
from gpt_jax.model.presets import GPT2, GPT2_LARGE, GPT2_MEDIUM, GPT2_XL
from gpt_jax.model.stack import unstack
from tests import tiny

CONFIG = dataclasses.replace(tiny.GPT2, vocab_size=67)
LLAMA = dataclasses.replace(tiny.LLAMA, vocab_size=67, vocab_multiple=8, d_head=6, biases=("qkv",), qk_norm=True)
GEMMA = dataclasses.replace(tiny.GEMMA, vocab_size=67, vocab_multiple=8, d_head=6)
ADAPTED = dataclasses.replace(LLAMA, lora=LoraConfig(rank=2))
ARCHITECTURES = {"gpt2": CONFIG, "llama": LLAMA, "gemma": GEMMA, "adapted": ADAPTED}


def make(config: ModelConfig = CONFIG) -> tuple[GPT, Params]:
    """A model, and parameters of which every one counts."""
    return GPT(config), tiny.random_params(config)


def logits(model: GPT, params: Params, tokens_BT: jax.Array) -> jax.Array:
    def compute(params: Params) -> jax.Array:
        return jax.vmap(lambda hidden: logits_NV(model, params, hidden))(forward(model, params, tokens_BT))

    return jax.jit(compute)(params)


def random_tokens(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count(bias: bool, name: str) -> None:
    config = dataclasses.replace(ARCHITECTURES[name], bias=bias, d_ff=80)
    params = tiny.initial_params(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.n_params


@pytest.mark.parametrize("attention", ["xla", "block_causal", "cudnn", "splash"])
def test_parameters_can_be_made_for_any_attention(attention: AttentionName) -> None:
    """Also for those that cannot run here, or not on a single token: a TPU's run begins like that."""
    config = dataclasses.replace(CONFIG, attention=attention, context_length=128, dtype="bfloat16")
    params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == config.n_params


def test_gpt2_sizes() -> None:
    """The published numbers of parameters, with the vocabulary that was published."""
    sizes = [
        dataclasses.replace(preset, vocab_size=50257).n_params for preset in (GPT2, GPT2_MEDIUM, GPT2_LARGE, GPT2_XL)
    ]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_initialisation() -> None:
    """GPT-2's: normal with deviation 0.02, divided by sqrt(2 L) where a block adds to the residual stream."""
    config = dataclasses.replace(CONFIG, d_model=256, vocab_size=1000)
    params = tiny.initial_params(config)
    residual = 0.02 / np.sqrt(2 * config.n_layer)
    layers = params["layers"]
    for kernel, std in [
        (params["tokens_VD"], 0.02),
        (params["positions_TD"], 0.02),
        (layers["attention"]["qkv"]["kernel"], 0.02),
        (layers["attention"]["out"]["kernel"], residual),
        (layers["mlp"]["up"]["kernel"], 0.02),
        (layers["mlp"]["down"]["kernel"], residual),
    ]:
        assert float(jnp.std(kernel)) == pytest.approx(std, rel=0.03)
        assert abs(float(jnp.mean(kernel))) < 1e-3
    assert not np.array_equal(layers["mlp"]["up"]["kernel"][0], layers["mlp"]["up"]["kernel"][1])
    assert all(np.all(x == 0) for x in (layers["mlp"]["up"]["bias"], layers["norm_1"]["bias"]))
    assert np.all(np.asarray(layers["norm_1"]["scale"]) == 1)


@functools.cache
def value_and_grads(config: ModelConfig) -> list[jax.Array]:
    """A scalar made of all hidden states, and its gradients."""
    model, params = make(config)
    tokens = random_tokens(np.random.default_rng(2), 2, 32)
    keys_B = jax.random.split(jax.random.key(3), 2)

    def loss(params: Params) -> jax.Array:
        return jnp.sum(jnp.sin(forward(model, params, tokens, keys_B)))

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.parametrize(
    "changes",
    [
        {"unroll": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "dots_no_batch"},
        {"unroll": False, "remat": "full"},
        {"unroll": False, "remat": "dots"},
    ],
)
@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("gpt2", 0.3),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("gpt2", 0), ("gemma", 0), ("adapted", 0.3))),
    ],
)
def test_how_it_runs_does_not_change_what_it_computes(changes: dict, name: str, dropout: float) -> None:
    """One parameter tree, the same hidden states and gradients, dropout included, however the layers are run."""
    config = ARCHITECTURES[name]
    base = dataclasses.replace(config, dropout=dropout, lora=dataclasses.replace(config.lora, dropout=dropout))
    for ours, expected in zip(
        value_and_grads(dataclasses.replace(base, **changes)), value_and_grads(base), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_rematerialisation_really_recomputes() -> None:
    """The policies are told apart by what they leave to the backward pass."""
    tokens = jnp.zeros((8, 32), jnp.int32)

    def saved_bytes(remat: RematName) -> int:
        model = GPT(dataclasses.replace(CONFIG, remat=remat, attention="xla"))
        backward = jax.eval_shape(
            lambda params: jax.vjp(lambda p: forward(model, p, tokens), params)[1], tiny.initial_params(CONFIG)
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    nothing, dots, full = saved_bytes("none"), saved_bytes("dots"), saved_bytes("full")
    assert full < dots < nothing


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_both_attentions_compute_the_same(name: str) -> None:
    """Without dropout: what they drop differs, since the blocks draw by themselves."""
    config = ARCHITECTURES[name]
    for ours, expected in zip(
        value_and_grads(dataclasses.replace(config, attention="xla")), value_and_grads(config), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_sequence_does_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    model, params = make(dataclasses.replace(CONFIG, dropout=0.3))
    tokens, keys_B = random_tokens(rng, 4, 32), jax.random.split(jax.random.key(3), 4)
    dropped = jax.jit(lambda tokens, keys_B: forward(model, params, tokens, keys_B))
    together = dropped(tokens, keys_B)
    np.testing.assert_allclose(together[2:3], dropped(tokens[2:3], keys_B[2:3]), rtol=1e-5, atol=1e-5)
    without = jax.jit(lambda tokens: forward(model, params, tokens))(tokens)
    assert not np.allclose(together, without, atol=1e-2)


@pytest.mark.parametrize(("name", "stacked"), [("gpt2", True), ("gpt2", False), ("llama", False), ("gemma", True)])
def test_cached_decoding_equals_the_full_pass_at_every_position(
    rng: np.random.Generator, name: str, stacked: bool
) -> None:
    """Ragged prompts in one batch, then token by token, against the whole sequences without a cache: within 1e-4."""
    config = ARCHITECTURES[name]
    model, params = make(config)
    T, prompt_lengths = config.context_length, np.array([1, 5, 9])
    tokens = random_tokens(rng, 3, T)
    expected = logits(model, params, tokens)
    if not stacked:
        params = {**params, "layers": unstack(params["layers"], config.n_layer)}
    step = jax.jit(lambda tokens, cache, start: forward_cached(model, params, tokens, cache, start))

    def check(hidden_BTD: jax.Array, row: int, t: int, position: int) -> None:
        ours = logits_NV(model, params, hidden_BTD[row, t][None])[0]
        np.testing.assert_allclose(ours, expected[row, position], atol=1e-4)

    longest = int(prompt_lengths.max())
    hidden, cache = step(tokens[:, :longest], init_cache(config, 3, T), jnp.zeros(3, jnp.int32))
    for row, length in enumerate(prompt_lengths):
        for t in range(length):
            check(hidden, row, t, t)
    positions = prompt_lengths.copy()
    while positions.max() < T:
        newest = tokens[np.arange(3), positions][:, None]
        hidden, cache = step(newest, cache, jnp.asarray(positions, jnp.int32))
        for row in range(3):
            check(hidden, row, 0, int(positions[row]))
        positions += 1


def test_padding_of_the_vocabulary_is_never_predicted(rng: np.random.Generator) -> None:
    """Logits of -inf, and no gradient: the loss is that of the model without it."""
    padded_model, padded = make(LLAMA)
    assert padded["tokens_VD"].shape == (72, 32)
    plain_model = GPT(dataclasses.replace(LLAMA, vocab_multiple=1))
    plain = {**padded, "tokens_VD": padded["tokens_VD"][:67], "head_VD": padded["head_VD"][:67]}
    tokens = random_tokens(rng, 2, 32)
    padded_logits = logits(padded_model, padded, tokens)
    assert np.all(np.asarray(padded_logits[..., 67:]) == -np.inf)
    np.testing.assert_allclose(padded_logits[..., :67], logits(plain_model, plain, tokens), rtol=1e-5, atol=1e-5)

    def loss(params: Params) -> jax.Array:
        hidden = forward(padded_model, params, tokens)
        return nats_in_chunks(hidden, head_VD(params), tokens, 67, 16).sum()

    grads = jax.jit(jax.grad(loss))(padded)
    assert np.all(np.asarray(grads["head_VD"][67:]) == 0)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_adapters_start_as_nothing(rng: np.random.Generator) -> None:
    """The product of the adapters is 0 before training, and every target has them, no other layer."""
    params = tiny.initial_params(ADAPTED)
    tokens = random_tokens(rng, 2, 32)
    np.testing.assert_array_equal(logits(GPT(ADAPTED), params, tokens), logits(GPT(LLAMA), params, tokens))
    params_of_two = tiny.initial_params(dataclasses.replace(LLAMA, lora=LoraConfig(rank=3, targets=("qkv", "down"))))
    names = {jax.tree_util.keystr(p, simple=True) for p, _ in jax.tree_util.tree_leaves_with_path(params_of_two)}
    assert {n.split(".")[0] for n in names if "lora_a" in n} == {"layersattentionqkvlora_a", "layersmlpdownlora_a"}


def test_compute_dtype(rng: np.random.Generator) -> None:
    """In bfloat16 the hidden states are, the parameters are not, and the result stays close."""
    _, params = make()
    tokens = random_tokens(rng, 2, 32)

    def compute(dtype: DTypeName) -> jax.Array:
        model = GPT(dataclasses.replace(CONFIG, dtype=dtype))
        return jax.jit(lambda params: forward(model, params, tokens))(params)

    expected, ours = compute("float32"), compute("bfloat16")
    assert ours.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=0.15)
