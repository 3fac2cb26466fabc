"""Records of all published formats mean the same messages; what no served model would see is refused with a reason."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.formats import read_records
from gpt_jax.data.messages import (
    PARSERS,
    Conversation,
    Message,
    Preference,
    chat,
    completion,
    format_of,
    learnt,
    parsed,
    preference,
    problem,
)
from gpt_jax.data.records import Record, RecordError, Skipped
from gpt_jax.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
ARGUMENTS = st.dictionaries(TEXT, st.integers() | TEXT | st.lists(st.booleans(), max_size=2), max_size=2)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@st.composite
def dialogues(draw: st.DrawFn, tools: bool = True) -> list[Message]:
    """User and assistant in turns, with calls and their results between if `tools`."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXT)))
        for name, arguments, result in draw(st.lists(st.tuples(TEXT, ARGUMENTS, TEXT), max_size=2 * tools)):
            messages.append({"role": "assistant", "content": "", "tool_calls": [call(name, arguments)]})
            messages.append({"role": "tool", "content": result})
        messages.append(assistant(draw(TEXT)))
    return messages


def openai(message: Message) -> Message:
    """As the API gives it: no content beside calls, arguments as JSON, nulls for what is not there."""
    calls = [call(c["function"]["name"], json.dumps(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    return {**message, "content": message["content"] or None, "name": None, "tool_calls": calls or None}


def parts(message: Message) -> Message:
    return (
        message if "tool_calls" in message else {**message, "content": [{"type": "text", "text": message["content"]}]}
    )


def share_gpt(message: Message) -> Message:
    if calls := message.get("tool_calls"):
        return {"from": "function_call", "value": json.dumps(calls[0]["function"])}
    roles = {"user": "human", "assistant": "gpt", "tool": "observation"}
    return {"from": roles[message["role"]], "value": message["content"]}


@given(messages=dialogues())
@pytest.mark.parametrize(
    ("field", "publish"),
    [("messages", dict), ("messages", openai), ("messages", parts), ("conversations", share_gpt)],
    ids=["plain", "OpenAI's", "in parts", "ShareGPT's"],
)
def test_a_conversation_is_the_same_in_all_formats(
    field: str, publish: Callable[[Message], Message], messages: list[Message]
) -> None:
    assert chat({field: [publish(message) for message in messages]}) == Conversation(tuple(messages), None)


@given(messages=dialogues(tools=False), system=TEXT, more=TEXT)
def test_alpaca(messages: list[Message], system: str, more: str) -> None:
    *before, question, answer = [message["content"] for message in messages]
    record = {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": [list(pair) for pair in zip(before[::2], before[1::2], strict=True)],
    }
    assert chat(record).messages == tuple(messages)
    expected = (*messages[:-2], user(f"{question}\n{more}"), assistant(answer))
    assert chat({**record, "input": more, "system": None}).messages == expected
    with_system = ({"role": "system", "content": system}, *messages)
    assert chat({**record, "history": record["history"] or None, "system": system}).messages == with_system


@given(messages=dialogues(), n=st.integers(0, 3))
def test_of_prompt_and_completion_the_completion_is_learnt(messages: list[Message], n: int) -> None:
    cut = min(2 * n + 1, len(messages) - 1)
    while messages[cut]["role"] != "assistant":
        cut += 1
    found = completion({"prompt": messages[:cut], "completion": messages[cut:]}).messages
    assert [{name: value for name, value in m.items() if name != "train"} for m in found] == messages
    assert [learnt(m) for m in found] == [i >= cut and m["role"] == "assistant" for i, m in enumerate(messages)]


def test_prompt_and_completion_may_be_texts() -> None:
    assert completion({"prompt": "a", "completion": "b"}).messages == (user("a"), assistant("b"))


@given(prompt=dialogues(tools=False), answers=st.tuples(TEXT, TEXT).filter(lambda pair: pair[0] != pair[1]))
def test_a_preference_is_the_same_in_all_formats(prompt: list[Message], answers: tuple[str, str]) -> None:
    prompt = prompt[:-1]
    chosen, rejected = map(assistant, answers)
    expected = Preference(tuple(prompt), (chosen,), (rejected,), None)
    whole = {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        whole,  # HH in messages.
        {**whole, "prompt": prompt[0]["content"], "messages": whole["chosen"]},  # UltraFeedback.
        {**whole, "prompt": prompt},
        {
            "conversations": [share_gpt(message) for message in prompt],
            "chosen": share_gpt(chosen),
            "rejected": share_gpt(rejected),
        },  # LLaMA-Factory.
    ]
    if len(prompt) == 1:
        text = prompt[0]["content"]
        records += [
            {"prompt": text, "chosen": answers[0], "rejected": answers[1]},
            {"instruction": text, "input": "", "chosen": answers[0], "rejected": answers[1]},
        ]
    for record in records:
        assert preference(record) == expected
        assert format_of(Record(record, "a", 0)) == ("preference", "chosen, rejected")


def test_the_transcripts_of_hh() -> None:
    shared = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: How are\n\nyou?"
    expected = Preference(
        (user("Hi!"), assistant("Hello."), user("How are\n\nyou?")), (assistant("Fine."),), (assistant("Bad."),), None
    )
    assert (
        preference({"chosen": f"{shared}\n\nAssistant: Fine.", "rejected": f"{shared}\n\nAssistant: Bad."}) == expected
    )
    assert preference({"prompt": f"{shared}\n\nAssistant:", "chosen": "Fine.", "rejected": "Bad."}) == expected


def test_a_problem_keeps_what_a_reward_needs() -> None:
    record = {"question": "2 + 2?", "answer": "4", "level": None, "system": "Reckon.", "tools": "[]"}
    prompt = ({"role": "system", "content": "Reckon."}, user("2 + 2?"))
    assert problem(record) == (prompt, {"answer": "4"}, None)
    assert problem({"prompt": [user("a")], "question": "b"}) == ((user("a"),), {"question": "b"}, None)


def test_tools_and_calls_get_the_shape_of_openai() -> None:
    function = {"name": "f", "parameters": {}}
    record = {"messages": [user("a"), assistant("b")], "tools": json.dumps([function])}
    expected = [{"type": "function", "function": function}]
    assert chat(record).tools == expected
    assert chat({**record, "tools": expected}).tools == expected
    assert chat({**record, "tools": ""}).tools is None
    calls = [{"name": "f", "arguments": '{"a": 1}'}, {"id": "x", "function": {"name": "g", "arguments": "no JSON"}}]
    messages = chat({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": calls}]}).messages
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"] == [call("f", {"a": 1}), {"id": "x", **call("g", "no JSON")}]


def test_reasoning_and_calls_among_the_parts() -> None:
    content = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    messages = chat({"messages": [user("a"), {"role": "assistant", "content": content}]}).messages
    assert messages[1] == {**assistant(""), "reasoning_content": "Hm.", "tool_calls": [call("f", {})]}


@pytest.mark.parametrize(("name", "no", "yes"), [("train", False, True), ("weight", 0, 1), ("loss_weight", 0.0, 1.0)])
def test_messages_may_say_whether_they_are_learnt(name: str, no: object, yes: object) -> None:
    turns = [{**user("a"), name: yes}, {**assistant("b"), name: no}, user("c"), assistant("d")]
    assert [learnt(message) for message in chat({"messages": turns}).messages] == [True, False, False, True]
    with pytest.raises(RecordError, match="message 2 of messages has a"):
        chat({"messages": [user("a"), {**assistant("b"), name: "yes"}]})


CALL: Message = {"role": "assistant", "content": "", "tool_calls": [{"id": "x", **call("f", {})}]}
RESULT = {"role": "tool", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, SYSTEM, user("a"), assistant("b")],
        [user("a"), SYSTEM, assistant("b")],
        [{"role": "developer", "content": ""}, user("a"), assistant("b"), user("after it")],
        [user("a"), CALL],
        [user("a"), {**CALL, "tool_calls": CALL["tool_calls"] * 2}, {**RESULT, "tool_call_id": "x"}, assistant("b")],
        [user("a"), {**CALL, "content": "b"}, {**RESULT, "content": ""}, CALL, RESULT, assistant("b")],
    ],
)
def test_what_templates_decide_is_accepted(messages: list[Message]) -> None:
    assert chat({"messages": messages}).messages == tuple(messages)


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([], "no messages", "messages is an empty list"),
        ("hello", "no messages", "messages is of type str, not a list"),
        (["hello"], "no messages", "message 1 of messages is no object"),
        ([assistant("a")], "roles out of order", r"message 1 of the conversation \(assistant\) comes before any"),
        ([user("a"), user("b"), assistant("c")], "roles out of order", "message 2 .* follows a message of the user"),
        ([user("a"), assistant("b"), assistant("c")], "roles out of order", "message 3 .* of the assistant"),
        ([user("a"), CALL, RESULT, user("b"), assistant("c")], "roles out of order", "message 4 .* of the tool"),
        ([user("a"), CALL, user("b"), assistant("c")], "a call without a result", "message 3"),
        ([user("a"), RESULT, assistant("c")], "a result without a call", "message 2"),
        ([user("a"), CALL, RESULT, RESULT, assistant("c")], "a result without a call", "message 4"),
        ([user("a"), CALL, {**RESULT, "tool_call_id": "y"}], "a result without a call", "message 3 .* no open call"),
        ([user("a")], "no answer to learn", "no answer"),
        ([user("a"), {**assistant("b"), "train": False}], "no answer to learn", "no answer"),
        ([user("a"), {"role": "assistant"}], "a message without content", r"message 2 of messages \(assistant\)"),
        ([user("a"), assistant(" \n")], "a message without content", "message 2"),
        ([user(""), assistant("b")], "a message without content", "message 1"),
        ([user("a"), {**assistant("b"), "content": 5}], "content of a wrong type", "message 2 .* of type int"),
        ([user("a"), {**assistant("b"), "content": [{"type": "image_url"}]}], "content of a wrong type", "'image_url'"),
        ([{"role": "users", "content": "a"}], "unknown role", "message 1 of messages has the role 'users'"),
        ([{"role": ["user"], "content": "a"}], "unknown role", "message 1"),
        ([{"content": "a"}], "unknown role", "the role None"),
        ([user("a"), {**assistant("b"), "train": 1}], "train is not true or false", "message 2 .* has a train"),
        ([user("a\ud800"), assistant("b")], "half of a surrogate pair", "message 1"),
        ([{**user("a"), "date": {1, 2}}, assistant("b")], "a value that is not JSON", "message 1"),
        ([{**user("a"), "tool_calls": [{}]}, assistant("b")], "a call of a wrong shape", "message 1"),
        ([user("a"), {"role": "assistant", "tool_calls": ["f"]}], "a call of a wrong shape", "without the name"),
        ([user("a"), {"from": "function_call", "value": "f(x)"}], "a call or tools that are not JSON", "message 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation_is_named(messages: Any, reason: str, detail: str) -> None:
    with pytest.raises(RecordError, match=detail) as caught:
        chat({"messages": messages})
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("chat", {"text": "a"}, "no messages"),
        ("chat", {"messages": [user("a"), assistant("b")], "label": False}, "an answer labelled bad"),
        ("chat", {"messages": [user("a"), assistant("b")], "images": ["a.png"]}, "more than text"),
        ("chat", {"messages": [user("a"), assistant("b")], "tools": "f"}, "a call or tools that are not JSON"),
        ("chat", {"messages": [user("a"), assistant("b")], "tools": '{"name": "f"}'}, "tools of a wrong type"),
        ("chat", {"instruction": "a", "output": ""}, "a message without content"),
        ("chat", {"instruction": "a", "output": "b", "history": ["c"]}, "no messages"),
        ("chat", {"instruction": 5, "output": "b"}, "content of a wrong type"),
        ("completion", {"prompt": "a"}, "no messages"),
        ("completion", {"prompt": [user("a"), assistant("b")], "completion": "c"}, "roles out of order"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ("preference", {"chosen": "b", "rejected": "c"}, "no messages"),
        ("preference", {"prompt": "a", "chosen": "b"}, "no messages"),
        (
            "preference",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "no messages",
        ),
        (
            "preference",
            {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "different prompts",
        ),
        ("preference", {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": "c"}, "different prompts"),
        ("problem", {"answer": "a"}, "no messages"),
        ("problem", {"prompt": [user("a"), assistant("b")]}, "no question"),
        ("problem", {"prompt": [user("a"), user("b")]}, "roles out of order"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(kind: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        PARSERS[kind](record)
    assert caught.value.reason == reason


FIELDS = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "question", "tools", "system"]
KEYS = ["role", "from", "content", "value", "train", "tool_calls", "function", "name", "type", "text", "arguments"]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "gpt", "{}", "[1]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(record=st.dictionaries(st.sampled_from([*FIELDS, "instruction", "input", "output", "history"]), ODD, max_size=5))
@pytest.mark.parametrize("kind", PARSERS)
def test_any_record_is_parsed_or_refused(kind: str, record: dict[str, Any]) -> None:
    with contextlib.suppress(RecordError):
        PARSERS[kind](record)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("messages prompt", ("chat", "messages")),
        ("conversations tools", ("chat", "conversations")),
        ("instruction input output", ("chat", "instruction, output")),
        ("prompt completion", ("completion", "prompt, completion")),
        ("chosen rejected", ("preference", "chosen, rejected")),
        ("question answer", ("problem", "question")),
        ("prompt question", ("problem", "prompt")),
        ("id text", ("text", "text")),
        ("messages text", "may be chat or text, by its fields messages, text; choose one with --format: "),
        ("prompt completion chosen rejected", "may be completion or preference, by its fields"),
        ("instruction", "is of no known format, by its fields instruction; choose one"),
        ("", r"is of no known format, by its fields \(none\); choose one"),
    ],
)
def test_fields_say_the_format(fields: str, expected: tuple[str, str] | str) -> None:
    record = Record({**dict.fromkeys(fields.split(), "a"), "text_or_null": None, "completion ": 1}, "FILE, line 1", 0)
    record = record._replace(
        value={**dict.fromkeys(fields.split(), "a"), **({} if "text" in fields else {"text": None})}
    )
    if isinstance(expected, tuple):
        assert format_of(record) == expected
        return
    with pytest.raises(UserError, match=f"^FILE, line 1 {expected}") as caught:
        format_of(record)
    assert "preference has chosen and rejected; chat has messages" in str(caught.value)


def test_errors_name_the_place_and_are_counted() -> None:
    good, bad = {"messages": [user("a"), assistant("b")]}, {"messages": [user("a")]}
    records = [Record(value, f"FILE, line {i}", i) for i, value in enumerate([good, bad, good], 1)]
    with pytest.raises(RecordError, match="FILE, line 2: it has no answer"):
        list(parsed(records, "chat"))
    skipped = Skipped()
    assert [record.where for record, _ in parsed(records, "chat", skipped)] == ["FILE, line 1", "FILE, line 3"]
    assert skipped.counts == {"no answer to learn": 1}


@pytest.mark.parametrize(
    ("name", "kind", "n_good", "skipped"),
    [
        ("alpaca_en_demo.json", "chat", 999, {}),
        ("alpaca_zh_demo.json", "chat", 1000, {}),
        ("identity.json", "chat", 91, {}),
        ("glaive_toolcall_en_demo.json", "chat", 300, {}),
        ("glaive_toolcall_zh_demo.json", "chat", 298, {"a result without a call": 2}),
        ("dpo_en_demo.json", "preference", 300, {}),
        ("dpo_zh_demo.json", "preference", 300, {}),
        ("kto_en_demo.json", "chat", 150, {"an answer labelled bad": 150}),
        ("v1_sft_demo.jsonl", "chat", 500, {}),
        ("reason_tool_use_demo_50.jsonl", "chat", 50, {}),
        ("mllm_demo.json", "chat", 0, {"more than text": 6}),
    ],
)
def test_published_files(llamafactory_data: Path, name: str, kind: str, n_good: int, skipped: dict[str, int]) -> None:
    records = list(read_records(llamafactory_data / name))
    found = format_of(records[0])[0]
    counter = Skipped()
    assert found == kind
    assert len(list(parsed(records, found, counter))) == n_good
    assert counter.counts == skipped


def test_published_calls_become_calls(llamafactory_data: Path) -> None:
    """Every call of the files is one of a function that its record has, with the arguments as a dict."""
    calls: Counter[str] = Counter()
    for name in ("glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"):
        for _, conversation in parsed(read_records(llamafactory_data / name), "chat"):
            assert isinstance(conversation, Conversation)
            names = {tool["function"]["name"] for tool in conversation.tools or []}
            for message in conversation.messages:
                for made in message.get("tool_calls", ()):
                    assert isinstance(made["function"]["arguments"], dict)
                    calls[name] += made["function"]["name"] in names
    assert calls == {"glaive_toolcall_en_demo.json": 211, "reason_tool_use_demo_50.jsonl": 68}
