"""Calls of tools: which template calls how, what is a call in a stream of text, and answers that must be calls."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.serve.grammar import Grammars
from gpt_jax.serve.tools import (
    FORMATS,
    NOTHING,
    Arguments,
    Call,
    Content,
    Piece,
    ToolParser,
    check_tools,
    for_template,
    forced,
    format_of,
    random_id,
    short_id,
)
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE, Chat
from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.cases import cases
from tests.llama_cpp import TEMPLATES
from tests.published import byte_level
from tests.serve.writing import answers

BYTES = ByteTokenizer().with_chat_template(TEMPLATE)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool whose parameters are these."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": parameters}}


WEATHER = tool("get_weather", city={"enum": ["Oslo", "北京"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
TOOLS = [WEATHER, {"type": "function", "function": {"name": "now"}}]

# fmt: off
CALLING = {
    "hermes": {
        "Bielik-11B-v3.0-Instruct", "MiMo-VL", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
        "Reka-Edge", "ibm-granite-granite-4.0", "ibm-granite-granite-4.1",
    },
    "llama": {
        "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    },
    "mistral": {"mistralai-Mistral-Nemo-Instruct-2407"},
    "mistral_id": {"Mistral-Small-3.2-24B-Instruct-2506"},
    "mistral_args": {"mistralai-Ministral-3-14B-Reasoning-2512", "unsloth-mistral-Devstral-Small-2507"},
}
# fmt: on


def chat_of(template: str) -> Chat:
    return Chat(template, {"bos_token": "<s>", "eos_token": "</s>"}, {}, lambda parts: [])


def test_templates_of_published_models(llama_cpp_vocabularies: Path) -> None:
    """The others call in other ways, write no calls, or show no tools."""
    found: dict[str | None, set[str]] = {}
    names = {format: name for name, format in FORMATS.items()}
    for name in TEMPLATES:
        format = format_of(chat_of((llama_cpp_vocabularies / "templates" / f"{name}.jinja").read_text()))
        found.setdefault(names[format] if format else None, set()).add(name)
    assert len(found.pop(None)) == len(TEMPLATES) - sum(map(len, CALLING.values()))
    assert found == CALLING


def test_our_template_calls_as_hermes_does() -> None:
    assert format_of(BYTES.chat) is FORMATS["hermes"]
    assert format_of(chat_of(TEMPLATE.replace("if tools", "if false"))) is None
    assert format_of(chat_of(TEMPLATE.replace("tool_call>", "call>"))) is None
    assert format_of(chat_of("{{ raise_exception('No.') }}")) is None


def written(format: str, calls: list[tuple[str, Any]], indent: int | None = None) -> str:
    """Calls as a model writes them."""
    f = FORMATS[format]
    texts = [
        f.call.replace("$NAME", name).replace("$ID", f"{i:09}").replace("$ARGUMENTS", json.dumps(value, indent=indent))
        for i, (name, value) in enumerate(calls)
    ]
    return f.begin + f.between.join(texts) + f.end


def parsed(format: str, texts: list[str], most: int | None = None) -> tuple[list[Piece], list[Piece]]:
    """What a parser says, with pieces of the same kind put together; and as it says it."""
    ids = itertools.count()
    parser = ToolParser(FORMATS[format], lambda: f"id{next(ids)}", most)
    said = [piece for text in texts for piece in parser.push(text)] + parser.flush()
    whole: list[Piece] = []
    for piece in said:
        before = whole[-1] if whole else None
        if isinstance(piece, Content) and isinstance(before, Content):
            whole[-1] = Content(before.text + piece.text)
        elif isinstance(piece, Arguments) and isinstance(before, Arguments):
            whole[-1] = Arguments(before.index, before.text + piece.text)
        else:
            whole.append(piece)
    return whole, said


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(['"}', "</tool_call>", "\\", "<"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
calls_of = st.lists(
    st.tuples(st.from_regex("[a-zA-Z0-9_-]{1,9}", fullmatch=True), st.dictionaries(st.text(max_size=3), values)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("format", FORMATS)
@given(calls=calls_of, indent=st.sampled_from([None, 1]), data=st.data())
def test_calls_come_out_as_they_were_written(
    format: str, calls: list[tuple[str, Any]], indent: int | None, data: st.DataObject
) -> None:
    """However the text is cut, and whatever is in the arguments; after some text, where there may be some."""
    calls = calls[: 1 if FORMATS[format].is_single else None]
    before = "" if format == "llama" else data.draw(st.sampled_from(["", "Let me see: <", "[]"]))
    text = before + data.draw(st.sampled_from(["", "\n"])) + written(format, calls, indent)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    texts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole, _ = parsed(format, texts)
    expected: list[Piece] = [Content(before)] if before else []
    for i, (name, value) in enumerate(calls):
        expected += [Call(i, f"id{i}", name), Arguments(i, json.dumps(value, indent=indent))]
    assert whole == expected


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_no_text_is_lost_and_cuts_do_not_matter(format: str, data: st.DataObject) -> None:
    """Of any mixture of parts of calls. Only what makes a call of its name and its arguments is left out."""
    call = written(format, [("f", {"a": 1}), ("g", {})][: 1 if FORMATS[format].is_single else None])
    parts = st.sampled_from([*'{}<>[]",; \n', "hello", call, *(call[i : i + 9] for i in range(0, len(call), 5))])
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    whole, _ = parsed(format, [text])
    assert parsed(format, list(text))[0] == whole
    left = text
    for piece in whole:
        shown = piece.name if isinstance(piece, Call) else piece.text
        skipped, found, left = left.partition(shown)
        assert found
        is_new = isinstance(piece, Call)
        signs = set(written(format, [("", {})])) | set("</tool_call>|python_tag") | set(' \n;,]}"id0123456789')
        assert set(skipped) <= signs, (skipped, is_new)
    if not [piece for piece in whole if isinstance(piece, Call)]:
        assert "".join(piece.text for piece in whole if isinstance(piece, Content)) == text


def test_what_may_begin_a_call_is_held_back_and_arguments_are_not() -> None:
    parser = ToolParser(FORMATS["hermes"], lambda: "id")
    assert parser.push("Hello ") == [Content("Hello")]
    assert parser.push("<b> and <tool") == [Content(" <b> and")]
    assert parser.push("box") == [Content(" <toolbox")]
    assert parser.push('\n<tool_call>\n{"name": "f') == []
    assert parser.push('", "arguments": {') == [Call(0, "id", "f"), Arguments(0, "{")]
    assert parser.push('"text": "Once') == [Arguments(0, '"text": "Once')]
    assert parser.push(' </tool_call>"}}') == [Arguments(0, ' </tool_call>"}')]
    assert parser.push("\n</tool_call>") == []
    assert parser.flush() == []


def call(index: int, name: str, arguments: str) -> list[Piece]:
    return [Call(index, f"id{index}", name), Arguments(index, arguments)]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", "<tool_call> begins a call\n", [Content("<tool_call> begins a call\n")]),
        (
            "hermes",
            '<tool_call>{"name": "f f", "arguments": {}}',
            [Content('<tool_call>{"name": "f f", "arguments": {}}')],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "x"}',
            [Content('<tool_call>{"name": "f", "arguments": "x"}')],
        ),
        # Cut by the greatest length: before, within and after the arguments.
        ("hermes", '<tool_call>\n{"name": "f", "arg', [Content('<tool_call>\n{"name": "f", "arg')]),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "b', call(0, "f", '{"a": "b')),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {}}\n</too', call(0, "f", "{}")),
        # A brace that was forgotten, after the arguments and within.
        ("hermes", '<tool_call>{"name":"f","arguments":{}\n</tool_call>', call(0, "f", "{}")),
        (
            "hermes",
            '<tool_call>{"name":"f","arguments":{"a":[\n</tool_call><tool_call>{"name":"g","arguments":{}}</tool_call>',
            [*call(0, "f", '{"a":[\n'), *call(1, "g", "{}")],
        ),
        (
            "hermes",
            '<tool_call>{"name":"f","arguments":{}}</tool_call>\nDone.',
            [*call(0, "f", "{}"), Content("\nDone.")],
        ),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {}}', call(0, "f", "{}")),
        ("llama", ' {"a": 1}', [Content(' {"a": 1}')]),
        ("llama", "{" + " " * 99, [Content("{" + " " * 99)]),
        ("llama", 'So: {"name": "f", "parameters": {}}', [Content('So: {"name": "f", "parameters": {}}')]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]', call(0, "f", "{}")),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"n', [*call(0, "f", "{}"), Content(', {"n')]),
    ],
)
def test_what_is_almost_a_call(format: str, text: str, expected: list[Piece]) -> None:
    assert parsed(format, [text])[0] == expected
    assert parsed(format, list(text))[0] == expected


@pytest.mark.parametrize("format", FORMATS)
def test_as_many_calls_as_are_asked_for(format: str) -> None:
    text = written(format, [("first", {"a": 1}), ("second", {})])
    assert parsed(format, list(text), most=1)[0] == call(0, "first", '{"a": 1}')
    parser = ToolParser(FORMATS[format], most=1)
    done = [parser.push(c) is not None and parser.is_done for c in text]
    assert text.index("{") < done.index(True) < text.index("second")


def test_ids_are_random() -> None:
    assert len({random_id() for _ in range(99)}) == 99
    assert random_id().startswith("call_")
    assert len(random_id()) == 29


@functools.cache
def marked(is_special: bool) -> HuggingFaceTokenizer:
    """A tokenizer in which the marks of all formats are tokens."""
    definition = json.loads((byte_level() / "tokenizer.json").read_bytes())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for mark in ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"):
        i = 597 + len(definition["added_tokens"])
        definition["added_tokens"].append({"id": i, "content": mark, "special": is_special, **flags})
    return HuggingFaceTokenizer(json.dumps(definition).encode(), {"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_marks_that_are_tokens_are_read_by_name(format: str, is_special: bool) -> None:
    """As Mistral's are, which are special, and Qwen's, which are not."""
    tokenizer = marked(is_special)
    calls = [("f", {"a": "🙂"}), ("g", {})][: 1 if FORMATS[format].is_single else None]
    text = FORMATS[format].mark + written(format, calls)
    special = tokenizer.special_tokens
    parts = filter(None, re.split(r"(<[^>]+>|\[[A-Z_]+\])", text))
    ids = [i for part in parts for i in ([special[part]] if part in special else tokenizer.encode(part))]
    assert bool({*ids} & {*special.values()}) == is_special
    assert max(ids) >= 600
    decoder = tokenizer.decoder(after=tokenizer.encode("a"))
    expected = [piece for i, (name, value) in enumerate(calls) for piece in call(i, name, json.dumps(value))]
    assert parsed(format, [*map(decoder.push, ids), decoder.flush()])[0] == expected


def forced_answers(tokenizer: Tokenizer, format: str, **choices: Any) -> dict[str, list[Piece]]:
    """What is written by choices of tools."""
    grammars = Grammars(tokenizer)
    asked = {
        name: forced(TOOLS, choice, FORMATS[format], grammars, not name.startswith("one"))
        for name, choice in choices.items()
    }
    return {
        name: parsed(format, [result.text])[0]
        for name, result in answers(tokenizer, asked).items()
        if result.finish_reason == "end_of_text"
    }


SPECIAL = [(format, "special") for format in FORMATS]


@pytest.mark.parametrize(
    ("format", "marks"),
    cases(itertools.product(FORMATS, ("text", "tokens", "special")), [*SPECIAL, ("hermes", "text")]),
)
def test_an_answer_that_must_call(format: str, marks: str) -> None:
    """Whatever the weights: nothing but calls, of one tool where one was asked for, with arguments of its schema."""
    tokenizer: Tokenizer = BYTES if marks == "text" else marked(marks == "special")
    named = {"type": "function", "function": {"name": "get_weather"}}
    choices = {f"{kind} {i}": "required" for kind in ("required", "one") for i in range(3)} | {"named": named}
    found = forced_answers(tokenizer, format, **choices)
    assert len(found) > 4
    schemas = {"get_weather": WEATHER["function"]["parameters"], "now": NOTHING}
    for name, pieces in found.items():
        assert len(pieces) == 2 if name.startswith("one") else len(pieces) >= 2
        for begun, arguments in zip(pieces[::2], pieces[1::2], strict=True):
            assert isinstance(begun, Call)
            assert isinstance(arguments, Arguments)
            assert name != "named" or begun.name == "get_weather"
            jsonschema.validate(json.loads(arguments.text), schemas[begun.name])


def test_nothing_is_forced_by_other_choices() -> None:
    for choice in (None, "auto", "none"):
        assert forced(TOOLS, choice, FORMATS["hermes"], Grammars(BYTES)) is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, "any", "tool_choice is auto, none, required, or an object"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice is auto, none, required, or an object"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "x"}},
            "names the function 'x', which is not among the tools",
        ),
        ([], "required", "tool_choice is required, and there are no tools"),
        ([tool("f", a={"type": "foo"})], "required", "the parameters of a tool cannot be used: .*Invalid type: foo"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
            "required",
            "the parameters of f are of type 'array', and not object",
        ),
    ],
)
def test_choices_that_are_refused(tools: list[Any], choice: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        forced(tools, choice, FORMATS["hermes"], Grammars(BYTES))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([3], r"tools\[0\] is no object with the type function"),
        ([WEATHER, {"type": "web_search"}], r"tools\[1\] is no object with the type function"),
        ([tool("a b")], "has the name 'a b'; it takes 1 to 64 letters"),
        ([tool("a" * 65)], "it takes 1 to 64 letters"),
        ([tool("")], "it takes 1 to 64 letters"),
        ([WEATHER, WEATHER], r"tools\[1\] has the name get_weather, as one before it"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], "a description that is no text"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "parameters that are no JSON object"),
        ([tool(f"f{i}") for i in range(129)], "there are 129 tools, and 128 is the limit"),
        ([tool("f", a={"description": "x" * 70_000})], "and 65,536 is the limit"),
    ],
)
def test_tools_that_are_refused(tools: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tools(tools)


def test_messages_are_as_templates_expect_them() -> None:
    """Those of OpenAI's clients, which send what is null, and arguments as text."""
    function = {"arguments": '{"a": "<|end|>"}', "name": "f"}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "call_1", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "assistant", "content": "One.", "tool_calls": []},
    ]
    changed = for_template(asked, FORMATS["hermes"])
    expected = {"name": "f", "arguments": {"a": "<|end|>"}}
    assert changed == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "function": expected}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "assistant", "content": "One."},
    ]
    assert asked[1]["tool_calls"][0]["function"] is function  # As it was.
    text = BYTES.decode(BYTES.chat.prompt(changed, [WEATHER]))
    assert '<tool_call>\n{"name": "f", "arguments": {"a": "<|end|>"}}\n</tool_call><|end|>' in text
    assert BYTES.chat.prompt(changed).count(BYTES.special_tokens["<|end|>"]) == 4  # None of them by the argument.
    for name, length in (("mistral", 9), ("mistral_id", 9), ("mistral_args", 6)):
        [_, first, second, _] = for_template(asked, FORMATS[name])
        assert first["tool_calls"][0]["id"] == second["tool_call_id"]
        assert len(second["tool_call_id"]) == length
    assert short_id("abcdEF123") == "abcdEF123"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", {}), ("{}", {}), ("[1]", "[1]"), ("{oops", "{oops"), ({"a": 1}, {"a": 1}), ("[" * 100_000, "[" * 100_000)],
)
def test_arguments_that_are_no_text_of_an_object_stay(arguments: Any, expected: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": [call]}]
    [changed] = for_template(messages, None)
    assert changed["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (3, "message 1 is no object"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "message 1 has tool_calls that are no list"),
        ({"role": "assistant", "tool_calls": [3]}, "message 1 has a call without a function that has a name"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "has a call without a function that has a name"),
    ],
)
def test_messages_of_another_form_are_refused(message: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        for_template([message], None)


@pytest.mark.parametrize("format", CALLING)
def test_published_templates_take_what_was_called(format: str, llama_cpp_vocabularies: Path) -> None:
    """A conversation as OpenAI's clients send it, with an id of ours."""
    sent = {"id": random_id(), "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [sent]},
        {"role": "tool", "tool_call_id": sent["id"], "content": "12:30"},
    ]
    for name in CALLING[format]:
        chat = chat_of((llama_cpp_vocabularies / "templates" / f"{name}.jinja").read_text())
        text = chat.render(chat.checked(for_template(messages, FORMATS[format])), [WEATHER], asks=True)
        called = f"{FORMATS[format].begin}{FORMATS[format].head}".replace("$NAME", "now").partition("$ID")[0]
        assert called in text
        assert "12:30" in text
