"""What clients get is what the engine draws, in OpenAI's words."""

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from gpt_jax.model.forward import forward
from gpt_jax.model.gpt import GPT
from gpt_jax.model.head import logits_NV
from gpt_jax.sample.generate import Result, generate_on
from gpt_jax.sample.settings import Settings, changed
from tests import tiny
from tests.serve.servers import CHAT, HELLO, TOOLS, WEATHER, Running, serving, tiny_engine

PROMPT = "Once upon a time"


def drawn(prompt: str | list[int], **settings: Any) -> Result:
    """What the same model draws without a server."""
    tokens = CHAT.encode(prompt) if isinstance(prompt, str) else prompt
    return generate_on(tiny_engine(), CHAT, [tokens], changed(Settings(), {"temperature": 0.0, **settings}))[0]


def test_a_completion_is_what_the_engine_draws(server: Running) -> None:
    expected = drawn(PROMPT, max_new_tokens=40, alternatives=3)
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=40, temperature=0, logprobs=3)
    [choice] = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["logprobs"]["token_logprobs"] == expected.logprobs
    assert [max(top.values()) for top in choice["logprobs"]["top_logprobs"]] == expected.logprobs  # It is greedy.
    assert choice["finish_reason"] == "length"
    assert answer["model"] == "tiny"
    n = len(CHAT.encode(PROMPT))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (n, 40, n + 40)


def test_a_stream_is_the_same_in_parts(server: Running) -> None:
    body: dict[str, Any] = {
        "prompt": [PROMPT, "The end"],
        "n": 2,
        "max_tokens": 40,
        "seed": 7,
        "logprobs": 2,
        "echo": True,
    }
    whole = server.post("/v1/completions", **body)
    events = server.events("/v1/completions", **body, stream_options={"include_usage": True})
    *chunks, last = events
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], whole["usage"]["completion_tokens"])
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert len(parts) > 2
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_an_event_is_one_line_to_whoever_splits_lines(server: Running) -> None:
    """Also to Python, for which a line ends at characters that JSON need not escape."""
    text = "".join(c for c in map(chr, range(0x3000)) if c.splitlines() == [""])
    assert len(text) == 10
    body: dict[str, Any] = {"prompt": text, "echo": True, "max_tokens": 1}
    events = server.events("/v1/completions", **body, seed=1)
    written = "".join(part["text"] for event in events for part in event["choices"])
    assert written == server.post("/v1/completions", **body, seed=1)["choices"][0]["text"]
    assert written.startswith(text)


def test_a_chat_is_what_the_engine_draws(server: Running) -> None:
    expected = drawn(CHAT.encode_chat(HELLO), max_new_tokens=30, alternatives=2)
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 30, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    [choice] = server.post("/v1/chat/completions", **body)["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    content = choice["logprobs"]["content"]
    assert [token["logprob"] for token in content] == expected.logprobs
    assert [[top["logprob"] for top in token["top_logprobs"]] for token in content] == [
        [logprob for _, logprob in step] for step in expected.alternatives
    ]
    events = server.events("/v1/chat/completions", **body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == expected.text
    streamed = [t for e in events if e["choices"][0]["logprobs"] for t in e["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"


def test_prompts_are_texts_or_tokens_one_or_several(server: Running) -> None:
    tokens = CHAT.encode(PROMPT)
    answers = [
        server.post("/v1/completions", prompt=prompt, max_tokens=8, temperature=0)["choices"]
        for prompt in (PROMPT, tokens, [PROMPT, "The"], [tokens, CHAT.encode("The")])
    ]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert answers[2][0] == answers[0][0]
    assert [choice["index"] for choice in answers[2]] == [0, 1]


def test_the_echoed_prompt_has_the_log_probabilities_of_the_model(server: Running) -> None:
    tokens = CHAT.encode(PROMPT * 12)[:180]  # More than a chunk.
    answer = server.post("/v1/completions", prompt=tokens, max_tokens=0, echo=True, logprobs=2)
    [choice] = answer["choices"]
    assert choice["text"] == CHAT.decode(tokens)
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)
    model = GPT(server.engine.model.config)
    params = tiny.uneven_params(server.engine.model.config)
    logits_TV = logits_NV(model, params, forward(model, params, jnp.array([tokens]))[0])
    logprobs_TV = np.asarray(logits_TV - np.logaddexp.reduce(np.asarray(logits_TV), axis=-1, keepdims=True))
    expected = [logprobs_TV[i, token] for i, token in enumerate(tokens[1:])]
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
    np.testing.assert_allclose(best, logprobs_TV[:-1].max(axis=-1), atol=1e-4)
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == list(range(180))


def test_the_same_seed_gives_the_same_answer_and_none_another_one(server: Running) -> None:
    def answers(**body: Any) -> list[str]:
        choices = server.post("/v1/completions", prompt=PROMPT, max_tokens=20, n=3, temperature=1.5, **body)["choices"]
        return [choice["text"] for choice in choices]

    assert answers(seed=3) == answers(seed=3)
    assert len({*answers(seed=3), *answers(seed=4), *answers(seed=-(2**62)), *answers(), *answers()}) == 15


@pytest.mark.parametrize("prefix_bytes", [0, 2**20])
def test_many_at_once_get_what_each_gets_alone(prefix_bytes: int) -> None:
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, 256, 140).tolist()
    asked = []
    for i in range(32):
        prompt = [*(beginning if i % 2 else []), *rng.integers(0, 256, rng.integers(1, 60)).tolist()]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": int(rng.integers(1, 50)), "logprobs": 3, "seed": i}
        asked.append(body | {"temperature": float(rng.choice([0, 0.7, 2])), "top_p": 0.9, "presence_penalty": 0.5})
    with serving(tiny_engine(prefix_bytes=prefix_bytes)) as server:
        alone = [server.post("/v1/completions", **body)["choices"] for body in asked]
        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(lambda body: server.post("/v1/completions", **body)["choices"], asked))
        assert together == alone
        assert server.engine.counts.reused_tokens > 0
        server.wait_until_idle()


def test_a_text_ends_at_a_string_or_a_token(server: Running) -> None:
    expected = drawn(PROMPT, max_new_tokens=40)
    stop = expected.text[10:12]
    [choice] = server.post("/v1/completions", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "zzzz"])[
        "choices"
    ]
    assert (choice["text"], choice["finish_reason"]) == (expected.text[: expected.text.index(stop)], "stop")
    token = expected.tokens[15]
    ended = drawn(PROMPT, max_new_tokens=40, stop_ids=(token,))
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 0}
    answer = server.post("/v1/completions", **body, stop_token_ids=[token])
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (ended.text, "stop")
    # That which ended it is counted, too, and among the log-probabilities.
    assert answer["usage"]["completion_tokens"] == len(ended.tokens)
    assert choice["logprobs"]["token_logprobs"] == ended.logprobs


def test_a_list_without_tokens_begins_a_text(server: Running) -> None:
    """As an empty text does. lm_eval asks so."""
    body: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    prompts: list[Any] = [[[]], ""]
    empty, text = (server.post("/v1/completions", prompt=prompt, **body) for prompt in prompts)
    assert empty["choices"] == text["choices"]
    assert empty["usage"]["prompt_tokens"] == 1


def test_bias_and_penalties_matter(server: Running) -> None:
    def text(**body: Any) -> str:
        answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=60, temperature=0, **body)
        return str(answer["choices"][0]["text"])

    bias = {str(ord("z")): 100}
    assert text(logit_bias=bias) == "z" * 60
    assert len(set(text(logit_bias=bias, frequency_penalty=2))) > 1
    assert len(set(text(logit_bias=bias, repetition_penalty=1e6))) > 1


def test_what_was_read_before_is_counted(server: Running) -> None:
    prompt = CHAT.encode(PROMPT + " and again" * 20)
    first = server.post("/v1/completions", prompt=prompt, max_tokens=1)
    again = server.post("/v1/completions", prompt=prompt, max_tokens=1, n=3)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128
    assert again["usage"]["prompt_tokens"] == len(prompt)


def test_embeddings_are_means_of_hidden_states(server: Running) -> None:
    tokens = [CHAT.encode("one"), CHAT.encode("some other text " * 10)]
    found = server.post("/v1/embeddings", input=tokens)
    model, params = server.engine.model, tiny.uneven_params(server.engine.model.config)
    for own, data in zip(tokens, found["data"], strict=True):
        expected_D = np.asarray(forward(model, params, jnp.array([own]))[0]).mean(axis=0)
        np.testing.assert_allclose(data["embedding"], expected_D, atol=1e-4)
    assert found["usage"] == {"prompt_tokens": 163, "total_tokens": 163}
    coded = server.post("/v1/embeddings", input=tokens[0], encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(found["data"][0]["embedding"])
    )


def test_tokens_of_texts_and_conversations(server: Running) -> None:
    for text in ("", "Grüße, 世界 🙂", "<|user|> is plain text"):
        tokens = server.post("/tokenize", prompt=text)["tokens"]
        assert tokens == CHAT.encode(text)
        assert server.post("/detokenize", tokens=tokens) == {"prompt": text}
    assert server.post("/tokenize", messages=HELLO)["tokens"] == CHAT.encode_chat(HELLO)
    end = httpx.get(f"{server.url}/tokenizer_info").json()["eos_token"]
    assert server.post("/tokenize", prompt=end)["tokens"] == [CHAT.end_of_text]  # As lm_eval asks for it.


def test_prompts_are_scored_while_others_are_written(server: Running) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "logprobs": 1}
    alone = server.post("/v1/completions", **body)["choices"]
    asked: dict[str, Any] = {"prompt": list(range(250)), "max_tokens": 0, "echo": True, "logprobs": 1}
    scores = server.post("/v1/completions", **asked)["choices"]
    found: list[Any] = []
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(lambda: server.post("/v1/completions", **body)["choices"]) for _ in range(4)]
        thread = threading.Thread(
            target=lambda: found.extend(server.post("/v1/completions", **asked)["choices"] for _ in range(5))
        )
        thread.start()
        assert [one.result() for one in writing] == [alone] * 4
        thread.join()
    assert found == [scores] * 5


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
WILD: dict[str, Any] = {"messages": HELLO, "temperature": 2.0, "seed": 3}


def test_answers_are_json_of_a_schema_beside_others_that_are_not(roomy: Running) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "mine", "schema": SCHEMA, "strict": True}}
    plain = {**WILD, "max_tokens": 60, "logprobs": True}
    alone = roomy.post("/v1/chat/completions", **plain)["choices"]
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(lambda: roomy.post("/v1/chat/completions", **plain)["choices"])
        choices = roomy.post("/v1/chat/completions", **WILD, n=4, response_format=response_format)["choices"]
        assert other.result() == alone
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert len({choice["message"]["content"] for choice in choices}) > 1
    events = roomy.events("/v1/chat/completions", **WILD, response_format=response_format)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == choices[0]["message"]["content"]


def test_an_object_that_is_cut_says_so(roomy: Running) -> None:
    body = {**WILD, "response_format": {"type": "json_object"}, "max_tokens": 3}
    [choice] = roomy.post("/v1/chat/completions", **body)["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("named", [False, True])
def test_tools_that_must_be_called_are(roomy: Running, named: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}} if named else "required"
    body = {**WILD, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    [answer] = roomy.post("/v1/chat/completions", **body)["choices"]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    [call] = answer["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    if named:
        assert call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    events = roomy.events("/v1/chat/completions", **body)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [part for e in events for part in e["choices"][0]["delta"].get("tool_calls") or ()]
    assert {part["index"] for part in deltas} == {0}
    assert deltas[0]["function"] == {"name": call["function"]["name"], "arguments": ""}
    assert "".join(part["function"]["arguments"] for part in deltas) == call["function"]["arguments"]
    assert [part["id"] for part in deltas if "id" in part] == [deltas[0]["id"]]
    history = [*HELLO, answer["message"], {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}]
    assert (
        roomy.post("/v1/chat/completions", messages=history, tools=TOOLS, max_tokens=2)["usage"]["prompt_tokens"] > 100
    )


def test_tools_that_may_be_called_are_shown_to_the_model(roomy: Running) -> None:
    def n(**body: Any) -> int:
        answer = roomy.post("/v1/chat/completions", messages=HELLO, max_tokens=1, **body)
        return int(answer["usage"]["prompt_tokens"])

    assert n() == n(tools=TOOLS, tool_choice="none") == n(tools=[])
    assert n(tools=TOOLS) == n(tools=TOOLS, tool_choice="auto") > n() + 100


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "'other'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "schema"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format goes with no tools"),
    ],
    ids=range(6),
)
def test_what_cannot_be_held_to_is_refused(roomy: Running, body: dict[str, Any], words: str) -> None:
    error = roomy.post("/v1/chat/completions", 400, None, messages=HELLO, **body)["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
