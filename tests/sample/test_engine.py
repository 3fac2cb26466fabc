"""The engine: rows that do not know each other, prefixes, cancellation, and programs that are compiled once."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT
from gpt_jax.model.head import logits_NV
from gpt_jax.sample.engine import ALL_CHUNKS, Engine, Request
from gpt_jax.sample.scheduler import QueueFullError, Scheduler
from gpt_jax.sample.settings import Filters
from tests import tiny
from tests.cases import cases
from tests.sample.engines import CONTEXT, MODELS, Answer, Answers, Sieve, as_bits, engine_of, random_requests

REQUESTS = random_requests(0, 24)
GREEDY = Filters(temperature=0)

engine = functools.cache(engine_of)
"""One engine a model, as a server has; what it holds of earlier tests must not matter."""


@functools.cache
def alone(name: str, number: int) -> Answer:
    """The answer to one of REQUESTS from an engine that has read nothing before."""
    engine(name).reset()
    [answer] = Answers(engine(name)).all([REQUESTS[number]])
    return answer


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, len(REQUESTS) - 1)),
        st.tuples(st.just("turn"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("name", cases(MODELS, ["gemma", "int8"]))
@settings(max_examples=15)
@given(schedule=steps)
def test_an_answer_is_the_same_whenever_and_beside_whatever_it_is_asked_for(
    name: str, schedule: list[tuple[str, int]]
) -> None:
    """Tokens, log-probabilities and alternatives, to the last bit: in any slot, among any neighbours, some of which are
    cancelled, after a prefix that is read now, is still there or was kept."""
    asked: dict[int, int] = {}  # The number of the request, by id.
    answers = Answers(engine(name))
    for step, n in schedule:
        if step == "ask":
            asked[answers.ask(REQUESTS[n])] = n
        elif step == "turn":
            for _ in range(n):
                answers.turn()
        elif asked:
            id = list(asked)[n % len(asked)]
            engine(name).cancel(id)
            if not answers.answers.get(id, ("",))[-1]:  # Not answered before.
                asked.pop(id)
                answers.answers.pop(id, None)
    while not engine(name).is_idle:
        answers.turn()
    assert answers.answers.keys() == asked.keys()
    for id, n in asked.items():
        assert answers.answers[id] == alone(name, n)


def test_samples_of_a_prompt_read_it_once() -> None:
    e = engine("llama")
    e.reset()
    chunks = e.counts.chunks
    prompt = list(range(200))
    requests = [Request(prompt, 10, Filters(1.0, top_p=1.0), seed=(0, 0, n)) for n in range(7)]  # More than slots.
    answers = Answers(e).all(requests)
    assert e.counts.chunks == chunks + 2
    assert len({tuple(answer[0]) for answer in answers}) == 7


def test_short_prompts_are_read_together() -> None:
    """As many as make up a chunk, those that are the same once; one of another size waits for its turn."""
    e = engine("llama")
    e.reset()
    chunks = e.counts.chunks
    shorts = [Request([i] * (12 + i), 10, GREEDY) for i in (0, 1, 2, 1)]
    together = Answers(e).all([*shorts[:2], shorts[1], *shorts[2:], Request([5] * 100, 10, GREEDY)])
    assert e.counts.chunks == chunks + 3  # There are three slots; the last of them found its prompt gone.
    for request, answer in zip(shorts, [*together[:2], together[3]], strict=False):
        e.reset()
        assert Answers(e).all([request]) == [answer]


def test_chunks_between_two_blocks() -> None:
    """One, so that those who write go on, or all, to the same answers."""
    requests = [Request(list(range(n)), 40, GREEDY) for n in (20, 200, 250)]
    one, every = (Engine(engine("gpt2").model, engine("gpt2").params, 3, chunks_a_turn=n) for n in (1, ALL_CHUNKS))
    answers = Answers(one).all(requests)
    assert Answers(every).all(requests) == answers
    assert one.counts.chunks == every.counts.chunks == 4  # The third finds a chunk of the second.
    assert every.counts.blocks < one.counts.blocks
    for e, writing in ((one, 1), (every, 3)):
        e.forget()
        for request in requests:
            e.submit(request)
        e.turn()
        assert len(e.scheduler.writing) == writing


def test_no_block_has_more_tokens_than_it_may() -> None:
    """And the answer is the same."""
    e = Engine(engine("gpt2").model, engine("gpt2").params, 3, block=4)
    request = Request([1, 2, 3], 20, GREEDY)
    e.submit(request)
    said = []
    while not e.is_idle:
        said += e.turn()
    assert [len(p.tokens) for p in said] == [1, 4, 4, 4, 4, 3]
    assert [token for p in said for token in p.tokens] == Answers(engine("gpt2")).all([request])[0][0]


def test_what_was_read_before_is_not_read_again() -> None:
    """A conversation goes on: only what is new, and the rest of a chunk, is read. Another one in between leaves what is
    kept, and counts say so."""
    e = engine("gpt2")
    e.reset()
    first, second = list(range(100, 250)), [7] * 140

    def chunks_for(tokens: list[int]) -> int:
        before = e.counts.chunks
        Answers(e).all([Request(tokens, 2, GREEDY)])
        return e.counts.chunks - before

    assert chunks_for(first) == 2
    assert chunks_for(first) == 0
    reused = e.counts.reused_tokens
    assert chunks_for([*first, 1, 2, 3]) == 1
    assert e.counts.reused_tokens == reused + 128
    assert chunks_for(second) == 2
    assert chunks_for(second[:135]) == 1  # The rest of a prompt is padded by itself.
    assert chunks_for([*first, 1, 2]) == 1
    assert chunks_for(first[:129]) == 0  # All but the last token are the kept chunk.


@pytest.mark.parametrize("other", ["nothing", "written", "cancelled"])
def test_other_weights_have_read_nothing(other: str) -> None:
    """Nor do they go on with what was asked of those before, or say what those have drawn."""
    e = engine_of("gpt2")
    request = Request(list(range(200)), 5, GREEDY)
    [before] = Answers(e).all([request])
    doubled = jax.tree.map(lambda x: 2 * x, e.params)
    if other != "nothing":
        id = e.submit(Request([7] * 300, 100, GREEDY))
        while not e.turn():  # Until it has begun to write.
            pass
        if other == "cancelled":
            e.cancel(id)
    e.replace_params(doubled)
    assert e.is_idle
    [after] = Answers(e).all([request])
    assert after[1] != before[1]
    assert after == Answers(Engine(e.model, doubled, 3)).all([request])[0]


@pytest.mark.parametrize("name", cases(["gpt2", "gemma"], ["gpt2"]))
def test_log_probabilities_are_those_of_the_full_pass(name: str) -> None:
    """The sum over an answer at a temperature of 1 without filters, which rewards will stand on: within 1e-4. What it
    was drawn from is the model's distribution, then."""
    e = Engine(engine(name).model, tiny.random_params(MODELS[name]), 3)
    prompts = [np.arange(n) % 259 for n in (1, 2, 100, 300)]
    requests = [Request(p.tolist(), 60, Filters(1.0, top_p=1.0), seed=(len(p), 0, 0)) for p in prompts]
    for request, (tokens, logprobs, drawn, _, _) in zip(requests, Answers(e).all(requests), strict=True):
        np.testing.assert_allclose(drawn, logprobs, atol=1e-5)
        whole = np.zeros((1, CONTEXT), np.int32)
        whole[0, : len(request.tokens) + 60] = [*request.tokens, *tokens]
        full_NV = jax.nn.log_softmax(logits_NV(e.model, e.params, forward(e.model, e.params, jnp.asarray(whole))[0]))
        first = len(request.tokens) - 1
        expected_N = full_NV[jnp.arange(first, first + 60), jnp.array(tokens)]
        np.testing.assert_allclose(logprobs, expected_N, atol=1e-4)
        np.testing.assert_allclose(sum(logprobs), expected_N.sum(), atol=1e-4)


def test_a_cache_in_int8_changes_log_probabilities_little() -> None:
    """Those of a text of several chunks, and of what is written after it."""
    config, tokens = MODELS["llama"], np.random.default_rng(0).integers(0, 256, 400).tolist()
    params, found = tiny.random_params(config), []
    for dtype in ("auto", "int8"):
        e = Engine(GPT(dataclasses.replace(config, cache_dtype=dtype)), params, 3)
        scores = e.score(tokens).logprobs_T[:-1]
        # What is drawn is decided by the bias alone, so that both write the same.
        steered = Request(tokens, 20, Filters(0.0, logit_bias=((7, 100.0),)))
        found.append(np.concatenate([scores, Answers(e).all([steered])[0][1]]))
    differences = np.abs(np.subtract(*found))
    assert 1e-6 < differences.max() < 0.02


def test_what_is_drawn_from_is_the_filtered_distribution() -> None:
    """Its log-probabilities, against NumPy's, from the alternatives that the model has."""
    requests = [Request([1, 2, 3], 30, Filters(0.5, top_k=3, top_p=1.0), seed=(5, 0, 0), alternatives=3)]
    [(tokens, logprobs, drawn, alternatives, _)] = Answers(engine("llama")).all(requests)
    for token, logprob, drawn_logprob, best in zip(tokens, logprobs, drawn, alternatives, strict=True):
        ids, theirs = zip(*best, strict=True)
        assert sorted(theirs, reverse=True) == list(theirs)
        place = ids.index(token)
        np.testing.assert_allclose(logprob, theirs[place], atol=1e-5)
        sharpened = np.exp(2 * np.array(theirs, np.float64))
        np.testing.assert_allclose(drawn_logprob, np.log(sharpened[place] / sharpened.sum()), atol=1e-4)


def test_a_seed_decides_and_without_one_nobody_does() -> None:
    e = engine("llama")
    hot = Filters(2.0, top_p=1.0)
    known = [Request([1, 2, 3], 20, hot, seed=(8, 0, 0)), Request([1, 2, 3], 20, hot, seed=(8, 0, 0))]
    a, b = Answers(e).all(known)
    assert a == b
    c, d = Answers(e).all([Request([1, 2, 3], 20, hot)] * 2)
    assert c[0] != d[0] != a[0]


def test_a_constrained_answer_is_drawn_from_what_is_allowed() -> None:
    """Against the full pass: log-probabilities stay those of the model, those of draws are those of the tokens that are
    allowed, after bias, however much it favours another one; and the most probable token is the best of them."""
    e = engine("gpt2")
    filters = [GREEDY, Filters(1.0, top_p=1.0), Filters(1.0, top_p=1.0, logit_bias=((5, 100.0), (6, -3.0)))]
    requests = [Request([n, 1, 2], 60, f, seed=(n, 0, 0), constraint=Sieve()) for n, f in enumerate(filters)]
    for request, (tokens, logprobs, drawn, _, reason) in zip(requests, Answers(e).all(requests), strict=True):
        assert (len(tokens), reason) == (60, "length")  # No error: what was drawn was allowed.
        whole = np.zeros((1, CONTEXT), np.int32)
        whole[0, :63] = [*request.tokens, *tokens]
        full_NV = logits_NV(e.model, e.params, forward(e.model, e.params, jnp.asarray(whole))[0])[2:62]
        np.testing.assert_allclose(logprobs, jax.nn.log_softmax(full_NV)[np.arange(60), tokens], atol=1e-4)
        sieve, masked_NV = Sieve(), np.array(full_NV)
        for token, bias in request.filters.logit_bias:
            masked_NV[:, token] += bias
        for step, token in enumerate(tokens):
            masked_NV[step, ~sieve.is_allowed()] = -np.inf
            sieve.take(token)
        if request.filters is GREEDY:
            assert tokens == masked_NV.argmax(axis=1).tolist()
        else:
            np.testing.assert_allclose(drawn, jax.nn.log_softmax(masked_NV)[np.arange(60), tokens], atol=1e-4)


class Faulty(Sieve):
    """A constraint that fails after ten tokens: it raises when it is asked or told, allows none, or unknown ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def allowed(self) -> np.ndarray:
        if len(self.taken) < 10 or self.how == "told":
            return super().allowed()
        if self.how == "asked":
            raise RuntimeError("out of order")
        return as_bits(np.zeros(259, bool) if self.how == "none" else np.ones(2**12, bool))

    def take(self, token: int) -> None:
        super().take(token)
        if len(self.taken) == 10 and self.how == "told":
            raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("how", "error"), [("asked", RuntimeError), ("told", RuntimeError), ("none", UserError), ("unknown", ValueError)]
)
def test_a_constraint_that_fails_ends_its_request_alone(how: str, error: type[Exception]) -> None:
    """With the tokens before, and the error. The others are answered as without it, and its slot is free."""
    e = engine("gpt2")
    others = [REQUESTS[0], REQUESTS[11]]
    expected = Answers(e).all(others)
    e.reset()
    id = e.submit(Request([1, 2, 3], 50, GREEDY, constraint=Faulty(how)))
    answers = Answers(e)
    ids = [answers.ask(other) for other in others]
    said = []
    while not e.is_idle:
        for progress in e.turn():
            if progress.id == id:
                said.append(progress)
            else:
                answers.put(progress)
    assert [answers.answers[other] for other in ids] == expected
    assert sum(len(progress.tokens) for progress in said) == 10
    assert [progress.finish_reason for progress in said] == [""] * (len(said) - 1) + ["constraint"]
    assert type(said[-1].error) is error
    assert len(e.scheduler.free) == e.n_slots
    [again] = Answers(e).all([Request([1, 2, 3], 50, GREEDY, constraint=Sieve())])
    assert again[4] == "length"


def test_a_constraint_holds_up_only_while_it_writes() -> None:
    """Blocks of one token, then longer ones again; the tokens that others wrote before it came are not lost."""
    e = engine("gpt2")
    e.reset()
    plain, constrained = Request([1], 100, GREEDY), Request([2], 5, GREEDY, constraint=Sieve())
    [expected] = Answers(e).all([plain])
    blocks, answers = e.counts.blocks, Answers(e)
    id = answers.ask(plain)
    answers.turn()
    answers.ask(constrained)
    while not e.is_idle:
        answers.turn()
    assert answers.answers[id] == expected
    assert e.counts.blocks - blocks == 1 + 5 + 3 + 1  # The last one begins before the end is known.


def test_no_setting_compiles_another_program(caplog: pytest.LogCaptureFixture) -> None:
    """Nor does any number of requests: after a few of them, none is compiled, by JAX's own log."""
    e = engine("llama")
    Answers(e).all([Request([1] * n, 2) for n in (1, 10, 20, 50, 100, 200)])  # Chunks of all sizes.
    Answers(e).all(random_requests(1, 30))
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        Answers(e).all(random_requests(2, 60))
        assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
        jax.jit(lambda x: x + 1)(np.float32(0))
        assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]  # The log would tell.


def test_a_second_request_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Arrays of a new engine are placed as those that its programs return. The context is no other engine's, so that
    the first request has to compile."""
    config = dataclasses.replace(MODELS["gpt2"], context_length=CONTEXT // 2)
    e = Engine(GPT(config), jax.device_put(tiny.uneven_params(config), jax.devices()[0]), 2)  # As when it is loaded.
    caplog.set_level(logging.WARNING)

    def compiled(request: Request) -> list[str]:
        caplog.clear()
        with jax.log_compiles():
            Answers(e).all([request])
        return [r.getMessage().split()[1] for r in caplog.records if r.getMessage().startswith("Compiling")]

    assert {"jit(insert)", "jit(decode_n)"} < set(compiled(Request([1, 2, 3], 20, GREEDY)))
    assert not compiled(Request([3, 2, 1], 20, GREEDY))
    e.reset()
    assert not compiled(Request([3, 2, 1], 20, GREEDY))


def test_the_number_of_programs_does_not_depend_on_that_of_requests(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that reserved nothing compiles as its caches grow, and nothing between its 500th and its 1,000th
    request of random lengths and settings, which come by themselves or many at the same time. No other engine of these
    tests has one layer, so that it has to compile all of its programs."""
    config = dataclasses.replace(MODELS["llama"], n_layer=1, context_length=CONTEXT // 2)
    e = Engine(GPT(config), jax.device_put(tiny.uneven_params(config)), 3, prefix_bytes=2**18)
    rng = np.random.default_rng(0)

    def compiled(requests: list[Request]) -> set[str]:
        caplog.clear()
        with jax.log_compiles():
            while requests:
                n = int(rng.choice([1, 2, 5, 40]))
                Answers(e).all(requests[:n])
                requests = requests[n:]
        return {r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")}

    caplog.set_level(logging.WARNING)
    requests = random_requests(3, 1000, config.context_length)
    programs = {message.split()[1] for message in compiled(requests[:500])}
    assert {"jit(prefill_chunk)", "jit(prefill_short)", "jit(move_chunks)", "jit(insert)", "jit(decode_n)"} <= programs
    assert not compiled(requests[500:])
    assert e.counts.requests == 1000


def test_what_is_raised_in_a_turn_leaves_an_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine("gpt2")
    expected = Answers(e).all(REQUESTS[:2])
    decode = Engine._decode

    def interrupted(self: Engine) -> None:
        decode(self)  # The state was donated, and its successor is lost.
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_decode", interrupted)
    e.submit(REQUESTS[0])
    with pytest.raises(KeyboardInterrupt):
        e.turn()
    monkeypatch.undo()
    assert e.is_idle
    assert Answers(e).all(REQUESTS[:2]) == expected


@pytest.mark.parametrize("where", ["add", "end"])
def test_an_interrupt_while_a_request_comes_or_goes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the engine knows of the request, and the other not."""
    e = engine("gpt2")
    expected = Answers(e).all(REQUESTS[:2])
    real = getattr(Scheduler, where)

    def interrupted(self: Scheduler, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    id = e.submit(REQUESTS[0])
    monkeypatch.setattr(Scheduler, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.submit(REQUESTS[1]) if where == "add" else e.cancel(id)
    monkeypatch.undo()
    assert e.is_idle
    e.cancel(id)
    assert Answers(e).all(REQUESTS[:2]) == expected


def test_what_is_not_finite_stays_with_its_sequence() -> None:
    """Where one was, the next finds its keys and values behind a mask, in the slot and in the cache of prompts."""
    config = dataclasses.replace(MODELS["gpt2"], tied_head=False)
    params = tiny.uneven_params(config)
    e = Engine(GPT(config), {**params, "tokens_VD": params["tokens_VD"].at[7].set(jnp.inf)}, 1)
    broken = Request([*[1] * 150, *[7] * 5, 1], 5, GREEDY)
    for length in (3, 130, 150):
        sound = Request([1] * length, 5, GREEDY)
        e.reset()
        expected = Answers(e).all([sound])
        assert np.isfinite(expected[0][1]).all()
        [(_, logprobs, *_)] = Answers(e).all([broken])
        assert np.isnan(logprobs).all()
        assert Answers(e).all([sound]) == expected


def test_caches_grow_with_what_is_asked_for() -> None:
    """To the same answers, whether there was room at the beginning or not."""
    e = Engine(engine("llama").model, engine("llama").params, 3)
    assert e.places == 64
    requests = sorted(REQUESTS, key=lambda request: request.places)[::4]
    assert Answers(e).all(requests) == Answers(engine("llama")).all(requests)
    assert e.places == CONTEXT


def test_a_full_queue_refuses() -> None:
    e = Engine(engine("gpt2").model, engine("gpt2").params, 1, most_waiting=1)
    e.submit(Request([1], 5, GREEDY))
    e.turn()  # It has the slot.
    e.submit(Request([2], 5, GREEDY))
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        e.submit(Request([3], 5, GREEDY))
    e.submit(Request([4], 5, GREEDY), is_new=False)  # One that has waited before is taken.
    while not e.is_idle:
        e.turn()
    assert (e.counts.requests, e.counts.drawn_tokens) == (3, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "a request has no tokens"),
        ({"tokens": [1, 259]}, "the model knows 259 tokens, and 259 is none of them"),
        ({"tokens": [-1]}, "and -1 is none of them"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not possible"),
        ({"tokens": [1] * 500}, "500 tokens and 20 new ones are more than the model's context_length, 512, has room"),
        ({"stop_ids": range(129)}, "129 tokens are to end a text, and 128 may"),
        ({"stop_ids": {2**32 + 1}}, "4294967297 is to end a text, and is no token"),
        ({"stop_ids": {-1}}, "-1 is to end a text, and is no token"),
        ({"seed": (0, 2**32, 0)}, "a seed of 4294967296 is not possible"),
        ({"seed": (-1, 0, 0)}, "a seed of -1 is not possible"),
        ({"filters": Filters(logit_bias=((259, 1.0),))}, "logit_bias names token 259, and the tokenizer has 259"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(changes: dict[str, object], message: str) -> None:
    e = engine("gpt2")
    with pytest.raises(UserError, match=message):
        e.submit(dataclasses.replace(Request([1, 2], 20), **changes))  # type: ignore[arg-type]
    assert e.is_idle
