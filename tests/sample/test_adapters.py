"""Adapters of several runs in one engine, of which each request has its own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gpt_jax.config import LoraConfig, ModelConfig, ParallelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.load import param_shapes
from gpt_jax.interop.save import parts_of
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.model.lora import Adapters, fold, join, joined, split
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.run.quantized import quantized, tree_of
from gpt_jax.sample.engine import ALL_CHUNKS, Engine, Request
from gpt_jax.sample.generate import Row, write
from gpt_jax.sample.replicas import engine_on
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny
from tests.cases import cases
from tests.sample.engines import MODELS, Answer, Answers, random_requests

CONTEXT = 256
RUNS = (
    LoraConfig(rank=2, alpha=3.0),
    LoraConfig(rank=3, alpha=5.0, targets=("qkv", "down")),
    LoraConfig(rank=1, alpha=2.0, targets=("out", "up")),
)
GREEDY = Filters(temperature=0)
LONG, SHORT = list(range(200)), [5, 6, 7, 8]


def config_of(name: str) -> ModelConfig:
    return dataclasses.replace(MODELS[name], context_length=CONTEXT, vocab_multiple=4)


@functools.cache
def adapters_of(name: str) -> tuple[Params, ...]:
    """The adapters of each run, large enough to change what is written."""
    rng = np.random.default_rng(2)
    shapes = [split(param_shapes(dataclasses.replace(config_of(name), lora=lora)))[0] for lora in RUNS]
    return tuple(jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), run) for run in shapes)


def together(name: str) -> Adapters:
    return joined(list(zip(adapters_of(name), RUNS, strict=True)))


@functools.cache
def base_of(name: str) -> Params:
    params = tiny.random_params(config_of(name))
    return jax.device_put(tree_of(dict(quantized(parts_of(params), config_of(name))))) if name == "int8" else params


@functools.cache
def engine_of(name: str, kept_bytes: int = 2**18) -> Engine:
    engine = Engine(GPT(config_of(name)), base_of(name), 3, prefix_bytes=kept_bytes, adapters=together(name))
    engine.reserve(CONTEXT)
    return engine


def requests() -> list[Request]:
    """The same with all adapters, of which short ones are read together, and others of all lengths and settings."""
    mixed = [dataclasses.replace(r, adapter=i % 4) for i, r in enumerate(random_requests(4, 12, CONTEXT))]
    same = [Request(prompt, 9, GREEDY, adapter=n) for prompt in (SHORT, LONG, [3]) for n in range(4)]
    return [*same, *mixed]


@pytest.mark.parametrize("name", cases(["llama", "gpt2", "int8"], ["llama"]))
def test_an_answer_is_the_same_beside_whatever_adapters(name: str) -> None:
    """Tokens, log-probabilities and alternatives, to the last bit: alone on an engine that has read nothing, among
    requests with other adapters, and where prefixes are kept or not."""
    engine, asked = engine_of(name), requests()
    alone: list[Answer] = []
    for request in asked:
        engine.reset()
        alone += Answers(engine).all([request])
    assert Answers(engine).all(asked) == alone
    assert Answers(engine).all(asked[::-1]) == alone[::-1]  # With what is kept of before.
    without = engine_of(name, 0)
    without.chunks_a_turn = ALL_CHUNKS
    assert Answers(without).all(asked) == alone
    assert len({str(answer) for answer in alone[:12]}) == 12


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_is_that_of_the_folded_model(name: str) -> None:
    """Log-probabilities within 1e-5 of those of a full pass, under which no token is likelier than a greedy one."""
    config, model = config_of(name), GPT(config_of(name))
    asked = [Request(LONG[:n], 20, GREEDY, adapter=adapter) for n in (3, 150) for adapter in range(4)]
    answers = Answers(engine_of(name)).all(asked)

    @jax.jit
    def logprobs_NV(params: Params, tokens_1T: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits_NV(model, params, forward(model, params, tokens_1T)[0]))

    folded = [base_of(name)]
    folded += [fold(join(base_of(name), own), lora) for own, lora in zip(adapters_of(name), RUNS, strict=True)]
    for request, (tokens, logprobs, *_) in zip(asked, answers, strict=True):
        whole = np.zeros((1, CONTEXT), np.int32)
        whole[0, : len(request.tokens) + 20] = [*request.tokens, *tokens]
        first = len(request.tokens) - 1
        each = [np.asarray(logprobs_NV(params, whole))[first : first + 20, : config.vocab_size] for params in folded]
        at = range(20), tokens
        np.testing.assert_allclose(logprobs, each[request.adapter][at], atol=1e-5, rtol=0)
        np.testing.assert_allclose(logprobs, each[request.adapter].max(axis=1), atol=1e-5, rtol=0)
        for other in {*range(4)} - {request.adapter}:
            assert np.abs(logprobs - each[other][at]).max() > 1e-2


def test_without_adapters_it_is_the_model() -> None:
    """What is added to its products is 0: log-probabilities are those of an engine that knows of no adapters."""
    asked = [Request(prompt, 20, GREEDY) for prompt in (SHORT, LONG, [3])]
    plain = Engine(GPT(config_of("llama")), base_of("llama"), 3)
    plain.reserve(CONTEXT)
    for ours, theirs in zip(Answers(engine_of("llama")).all(asked), Answers(plain).all(asked), strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6, rtol=1e-6)


def test_what_was_read_with_some_adapters_is_not_reused_with_others() -> None:
    """A short prompt takes a row for each of its adapters; a long one is read, and kept, for each."""
    e = engine_of("llama")
    e.reset()

    def chunks_for(prompt: list[int], *adapters: int) -> int:
        before = e.counts.chunks
        Answers(e).all([Request(prompt, 2, GREEDY, adapter=n) for n in adapters])
        return e.counts.chunks - before

    assert chunks_for(SHORT, 1, 2, 1) == 1
    assert [chunks_for(SHORT, n) for n in (2, 1, 0)] == [0, 0, 1]
    assert [chunks_for(LONG, n) for n in (1, 1, 2, 1)] == [2, 0, 2, 1]  # The rest of a chunk is not kept.
    assert chunks_for([3], 2) == 0
    e.read(LONG[:130], 3)
    assert [chunks_for(LONG[:129], n) for n in (3, 2, 1, 0)] == [0, 0, 0, 1]


def test_other_weights_have_the_same_adapters() -> None:
    e = Engine(GPT(config_of("llama")), base_of("llama"), 3, adapters=together("llama"))
    asked = [Request(SHORT, 5, GREEDY, adapter=n) for n in range(4)]
    before = Answers(e).all(asked)
    e.replace_params(base_of("llama"))
    assert Answers(e).all(asked) == before


@pytest.mark.parametrize("mesh", cases([{}, {"fsdp": 2, "tensor": 2}], [{"fsdp": 2, "tensor": 2}]), ids=str)
def test_on_several_devices(mesh: dict[str, int]) -> None:
    """By pmap and on a mesh, the same tokens, and log-probabilities within 1e-5."""
    config, devices = config_of("llama"), jax.devices()[:4]
    placement = choose_placement(ParallelConfig(**mesh), config, devices) if mesh else Placement(devices[:2])
    params = jax.device_put(base_of("llama"), placement.state_shardings(base_of("llama")))
    several = engine_on(placement, GPT(config), params, 8, 2, adapters=together("llama"))
    asked = [Request(prompt, 5, GREEDY, adapter=n) for prompt in (SHORT, LONG) for n in range(4)]
    for ours, theirs in zip(Answers(several).all(asked), Answers(engine_of("llama")).all(asked), strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


def test_a_text_is_written_with_its_adapters() -> None:
    e, settings = engine_of("llama"), Settings(max_new_tokens=5, filters=GREEDY)
    rows = [Row(SHORT, ByteTokenizer(), settings, adapter=n) for n in range(4)]
    written = sorted(write(e, rows))
    expected = Answers(e).all([Request(SHORT, 5, GREEDY, ByteTokenizer().stop_ids, adapter=n) for n in range(4)])
    assert [row.result.logprobs for _, row in written] == [answer[1] for answer in expected]


def test_adapters_that_are_not_there_are_refused() -> None:
    plain = Engine(GPT(config_of("llama")), base_of("llama"), 1)
    for e, adapter, most in ((engine_of("llama"), 4, 3), (engine_of("llama"), -1, 3), (plain, 1, 0)):
        with pytest.raises(UserError, match=f"adapter = {adapter} is not possible: it must be 0 .* to {most}"):
            e.submit(Request([1], 1, adapter=adapter))
        assert e.is_idle
