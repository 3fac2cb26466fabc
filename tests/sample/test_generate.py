"""Generation with a small random model and the byte tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import DTypeName
from gpt_jax.errors import UserError
from gpt_jax.model.cache import init_cache
from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.head import logits_NV
from gpt_jax.sample.decode import (
    bucket,
    decode_n,
    first_largest,
    init_state,
    insert,
    make_row,
    prefill_chunk,
    prepare_params,
)
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.generate import Result, Row, encode_prompt, generate, generate_tokens, write
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests import tiny
from tests.sample.engines import Sieve

TOKENIZER = ByteTokenizer()
CONFIG = dataclasses.replace(
    tiny.GPT2,
    vocab_size=TOKENIZER.vocab_size + 3,  # Padded, as a model's vocabulary may be.
    context_length=64,
    n_head=2,
)
MODEL = GPT(CONFIG)
GREEDY = Filters(temperature=0)
HOT = Filters(temperature=1.5, top_p=1)  # The same wherever texts are drawn, since others are another program.


@pytest.fixture(scope="module")
def params() -> Params:
    """Random, and far from uniform, so that rounding decides no token."""
    rng = np.random.default_rng(0)
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: x + 0.15 * rng.normal(size=x.shape).astype(np.float32), params)


def run(params: Params, *prompts: str, n: int = 20, num_samples: int = 1, **changes: object) -> list[Result]:
    settings = dataclasses.replace(Settings(max_new_tokens=n, filters=GREEDY), **changes)  # type: ignore[arg-type]
    return generate(MODEL, params, TOKENIZER, prompts, settings, num_samples)


@jax.jit
def full_logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
    return logits_NV(MODEL, params, forward(MODEL, params, tokens_BT)[0])


def slow_greedy(params: Params, prompt: str, n: int) -> tuple[list[int], list[float]]:
    """Without a cache: the whole window through the model for every token, as the documentation says it slides."""
    tokens = list(prompt.encode())
    start, logprobs = 0, []
    for _ in range(n):
        if len(tokens) - start > CONFIG.context_length:
            start = len(tokens) - CONFIG.context_length // 2
        window = tokens[start:]
        padded = np.zeros((1, CONFIG.context_length), np.int32)
        padded[0, : len(window)] = window
        logits = full_logits(params, padded)[len(window) - 1, : TOKENIZER.vocab_size]
        tokens.append(int(jnp.argmax(logits)))
        logprobs.append(float(jax.nn.log_softmax(logits)[tokens[-1]]))
    return tokens[len(prompt.encode()) :], logprobs


@pytest.mark.parametrize("n", [1, 2, 40, 150])
def test_greedy_text_equals_decoding_without_a_cache(params: Params, n: int) -> None:
    """Also past the context length, where the window slides."""
    prompt = "The quick brown fox"
    [result] = run(params, prompt, n=n)
    tokens, logprobs = slow_greedy(params, prompt, n)
    assert result.tokens == tokens[: len(result.tokens)]
    assert len(result.tokens) == n or result.finish_reason == "end_of_text"
    np.testing.assert_allclose(result.logprobs, logprobs[: len(result.tokens)], atol=1e-4)


@pytest.mark.parametrize("filters", [GREEDY, Filters(temperature=1.3, top_k=50, top_p=0.95, repetition_penalty=1.2)])
def test_a_row_of_a_batch_equals_its_prompt_alone(params: Params, filters: Filters) -> None:
    """Prompts of different lengths, two samples each, long enough for windows to slide at different times."""
    prompts = ["A", "a longer prompt than that", "语言模型", ""]
    together = run(params, *prompts, n=120, num_samples=2, filters=filters)
    for i, prompt in enumerate(prompts):
        alone = run(params, prompt, n=120, num_samples=2, filters=filters)
        for ours, expected in zip(together[2 * i : 2 * i + 2], alone, strict=True):
            assert ours.tokens == expected.tokens
            assert ours.text == expected.text
            np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-4)


def test_padding_of_the_vocabulary_changes_nothing(params: Params) -> None:
    """Nor does it with a repetition penalty, which keeps a flag a token."""
    filters = Filters(temperature=0.0, repetition_penalty=1.3)
    padded_model = GPT(dataclasses.replace(MODEL.config, vocab_multiple=128))
    V, rows = MODEL.config.vocab_size, padded_model.config.embedding_rows
    assert rows > V
    padded = {**params, "tokens_VD": jnp.zeros((rows, MODEL.config.d_model)).at[:V].set(params["tokens_VD"])}
    settings = Settings(max_new_tokens=40, filters=filters)
    [result] = generate(padded_model, padded, TOKENIZER, ["Once"], settings)
    [expected] = generate(MODEL, params, TOKENIZER, ["Once"], settings)
    assert result.tokens == expected.tokens


def test_same_seed_same_text_and_another_seed_another(params: Params) -> None:
    [a], [b], [c] = (run(params, "Once", filters=HOT, seed=seed) for seed in (7, 7, 8))
    assert a == b
    assert a.tokens != c.tokens
    first, second = run(params, "Once", filters=HOT, num_samples=2)
    assert first.tokens != second.tokens


def test_every_token_is_drawn_by_a_key_of_its_own(params: Params) -> None:
    """Where all tokens are as probable as the others, a text has hardly any of them twice."""
    [result] = run(jax.tree.map(jnp.zeros_like, params), "Once", filters=HOT)
    assert len(set(result.tokens)) > 15


def test_log_probabilities_are_those_before_the_filters(params: Params) -> None:
    """And before penalties and biases."""
    changed = dataclasses.replace(HOT, repetition_penalty=1.3, presence_penalty=0.5, logit_bias=((97, 3.0),))
    [result] = run(params, "Once", filters=changed)
    tokens = np.array([[*b"Once", *result.tokens]], np.int32)
    padded = np.pad(tokens, ((0, 0), (0, CONFIG.context_length - tokens.shape[1])))
    logprobs = jax.nn.log_softmax(full_logits(params, padded)[:, : TOKENIZER.vocab_size])
    expected = [logprobs[3 + i, token] for i, token in enumerate(result.tokens)]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


def test_drawn_tokens_are_penalised(params: Params) -> None:
    """As those of the prompt are, against a loop that computes all of it anew for every token."""
    penalty, tokens = 1.3, list(b"Once")
    [result] = run(params, "Once", n=40, filters=Filters(temperature=0.0, repetition_penalty=penalty))
    for token in result.tokens:
        padded = np.pad(np.array([tokens], np.int32), ((0, 0), (0, CONFIG.context_length - len(tokens))))
        logits = np.array(full_logits(params, padded)[len(tokens) - 1, : TOKENIZER.vocab_size])
        seen = sorted(set(tokens))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        assert token == np.argmax(logits)
        tokens.append(token)
    assert len(set(result.tokens)) > len(set(run(params, "Once", n=40)[0].tokens))


def test_what_is_streamed_is_the_text(params: Params) -> None:
    """Pieces concatenate to the text, and none of them holds a part of a character that was still arriving."""
    pieces: dict[int, list[str]] = {0: [], 1: []}
    settings = Settings(max_new_tokens=60, filters=HOT)
    results = generate(
        MODEL, params, TOKENIZER, ["x", "生成"], settings, on_text=lambda row, text: pieces[row].append(text)
    )
    for row, result in enumerate(results):
        tokens = result.tokens[: -1 if result.finish_reason == "end_of_text" else None]
        assert "".join(pieces[row]) == result.text == TOKENIZER.decode(tokens)
        assert len(pieces[row]) > 1


def test_stop_strings_end_the_text_and_are_not_part_of_it(params: Params) -> None:
    settings = {"filters": HOT, "n": 80, "seed": 1}
    [whole] = run(params, "Stop", **settings)  # type: ignore[arg-type]
    stop = whole.text[20:23]
    expected = whole.text[: whole.text.index(stop)]
    pieces: list[str] = []
    [result] = generate(
        MODEL,
        params,
        TOKENIZER,
        ["Stop"],
        Settings(80, 1, (stop, "never in it"), filters=HOT),
        on_text=lambda row, text: pieces.append(text),
    )
    assert (result.text, result.finish_reason) == (expected, "stop")
    assert "".join(pieces) == expected


def test_logits_that_are_no_numbers_are_no_text(params: Params) -> None:
    damaged = {**params, "tokens_VD": params["tokens_VD"].at[3, 0].set(jnp.nan)}
    for filters in (GREEDY, HOT):
        with pytest.raises(UserError, match="the log-probability of a token is nan: the model's weights are damaged"):
            run(damaged, "x", filters=filters)


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    """Also when one token completes both."""
    row = Row([TOKENIZER.end_of_text], TOKENIZER, Settings(stop=("bc", "abc")))
    shown = "".join(row.add(token, 0.0) for token in b"xabcd")
    assert (shown, row.result.text, row.result.finish_reason) == ("x", "x", "stop")


def test_end_of_text_ends_the_text(params: Params) -> None:
    certain = jax.tree.map(lambda x: x, params)
    row = certain["tokens_VD"][TOKENIZER.end_of_text]
    certain["final_norm"] = {**certain["final_norm"], "bias": 50 * row / jnp.linalg.norm(row)}
    [result] = run(certain, "x")
    assert (result.tokens, result.text, result.finish_reason) == ([TOKENIZER.end_of_text], "", "end_of_text")
    assert len(result.logprobs) == 1


def test_any_of_the_stop_ids_ends_the_text(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    [whole] = run(params, "x")
    stop = whole.tokens[5]
    monkeypatch.setattr(ByteTokenizer, "stop_ids", frozenset({TOKENIZER.end_of_text, stop}))
    [result] = run(params, "x")
    assert result.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert result.text == TOKENIZER.decode(result.tokens[:-1])
    assert result.finish_reason == "end_of_text"


@pytest.mark.parametrize("fails", [False, True])
def test_a_constraint_holds_beyond_the_context(params: Params, fails: bool) -> None:
    """Where the window slides, another one goes on with what was drawn. An error ends the text, and is told with it."""
    made: list[Sieve] = []

    class Failing(Sieve):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def take(self, token: int) -> None:
            if fails and len(self.taken) == 99:
                raise RuntimeError("out of order")
            super().take(token)

    engine = Engine(MODEL, params, 2, n_tokens=TOKENIZER.vocab_size)
    row = Row(list(b"The"), TOKENIZER, Settings(150, filters=HOT), constraint=Failing)
    row.stop_ids = frozenset()
    [(_, written)] = write(engine, [row])
    assert written is row
    assert len(made) > 1
    if fails:
        assert (len(row.result.tokens), row.result.finish_reason, str(row.error)) == (100, "constraint", "out of order")
    else:
        assert (row.result.tokens, row.result.finish_reason, row.error) == (made[-1].taken, "length", None)


def test_prompts_may_be_token_ids(params: Params) -> None:
    settings = Settings(max_new_tokens=20, filters=GREEDY)
    results = generate_tokens(MODEL, params, TOKENIZER, [list(b"The quick"), [TOKENIZER.end_of_text]], settings)
    assert results == run(params, "The quick", "")


def test_a_prompt_follows_what_begins_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode_prompt("ab", TOKENIZER, 64) == [97, 98]
    assert encode_prompt("", TOKENIZER, 64) == [TOKENIZER.end_of_text]
    monkeypatch.setattr(TOKENIZER, "begin_of_text", 258)
    assert encode_prompt("ab", TOKENIZER, 64) == [258, 97, 98]
    assert encode_prompt("", TOKENIZER, 64) == [258]


def test_padding_of_the_vocabulary_is_never_drawn(params: Params) -> None:
    row = params["tokens_VD"][0]
    tempting = {**params, "tokens_VD": params["tokens_VD"].at[-3:].set(row)}
    tempting["final_norm"] = {**params["final_norm"], "bias": 50 * row / jnp.linalg.norm(row)}
    [result] = run(tempting, "x", n=50, filters=Filters(temperature=2.0, top_p=1))
    assert max(result.tokens) < TOKENIZER.vocab_size


def test_prepared_parameters_compute_the_same_and_are_not_prepared_again(params: Params) -> None:
    prepared = prepare_params(params, CONFIG)
    assert prepare_params(prepared, CONFIG) is prepared
    tokens = np.arange(24, dtype=np.int32)[None]
    np.testing.assert_allclose(full_logits(prepared, tokens), full_logits(params, tokens), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_donated_parameters_leave_no_second_copy(dtype: DTypeName) -> None:
    """The same result; of what was given, only what is a part of the result is left."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = tiny.initial_params(config)
    expected = prepare_params(params, config)
    given = jax.tree.leaves(params)
    prepared = prepare_params(params, config, donate=True)
    jax.tree.map(np.testing.assert_array_equal, prepared, expected)
    kept = {id(leaf) for leaf in jax.tree.leaves(prepared)}
    assert all(leaf.is_deleted() != (id(leaf) in kept) for leaf in given)


def test_a_prompt_longer_than_the_context_is_refused(params: Params) -> None:
    assert len(run(params, "x" * 64, n=1)[0].tokens) == 1
    with pytest.raises(UserError, match="the prompt has 65 tokens, and the model's context_length is 64"):
        run(params, "x" * 65)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 16), (16, 16), (17, 32), (33, 64), (63, 64), (64, 64), (65, 100), (100, 100)]
)
def test_buckets(length: int, expected: int) -> None:
    assert bucket(length, 100) == expected


def test_prepared_matrices_are_in_the_compute_type() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model, params = GPT(config), tiny.initial_params(config)
    as_they_were = prepare_params(params, dataclasses.replace(config, dtype="float32"))
    prepared = prepare_params(params, config)
    assert {str(x.dtype) for x in jax.tree.leaves(prepared) if x.ndim >= 2} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(prepared) if x.ndim < 2} == {"float32"}
    logprobs = []
    for form in (as_they_were, prepared):
        state = init_state(config, 1, 128)
        cache = init_cache(config, 1, 128)
        tokens = np.arange(16, dtype=np.int32)
        cache = prefill_chunk(model, form, cache, tokens[None], np.int32(0))
        row = make_row(config, tokens.tolist(), 16, 1, GREEDY, ())
        state = insert(model, state, np.int32(0), row, cache, np.int32(0))
        keep_S = np.ones(1, bool)
        _, block = decode_n(model, form, state, keep_S, np.int32(1), config.vocab_size)
        logprobs.append(block.logprobs_NS[0])
    # Embeddings are rounded before they are added up, and not after it: bfloat16 has eight bits.
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=2e-2)


def test_of_tokens_that_are_as_probable_the_first_is_the_most_probable() -> None:
    """As argmax has it; a row that is no number at all gives a token that every tokenizer has."""
    logits = np.array([[1, 3, 3, 2], [-np.inf, -np.inf, 0, 0], [5, 1, 1, 5], [np.nan] * 4], np.float32)
    np.testing.assert_array_equal(first_largest(jnp.asarray(logits)), [1, 2, 0, 0])
