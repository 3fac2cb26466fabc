"""Answers keep to their grammars, whatever the model makes of them: random weights write JSON of every schema."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from gpt_jax.data.train_tokenizer import train_sentencepiece
from gpt_jax.errors import UserError
from gpt_jax.interop.load import named_tokenizer
from gpt_jax.serve.grammar import Grammars, lark_grammar, regex_grammar
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.published import CHINESE, TEXT
from tests.serve.writing import answers

BYTES = ByteTokenizer().with_chat_template(TEMPLATE)
OF_BYTES = Grammars(BYTES)
SHORT = {"type": "string", "maxLength": 8}


def record(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these properties, and no others."""
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": record(name=SHORT, address=record(city=SHORT, at=record(x={"type": "boolean"}))),
    "enum": record(colour={"enum": ["red", "green", "blue", None, 7]}),
    "array": record(tags={"type": "array", "items": {"enum": ["a", "bc"]}, "minItems": 2, "maxItems": 4}),
    "anyOf": {"anyOf": [record(a={"type": "null"}), record(b={"const": [1, {"x": "y"}]}), {"const": 3}]},
    "const": record(kind={"const": "point"}, version={"const": 2}),
    "pattern": record(id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}(x|yz)?$"}),
    "format": record(**{f.replace("-", ""): {"type": "string", "format": f} for f in ("date", "uuid", "ipv4")}),
    "integers": record(age={"type": "integer", "minimum": 18, "maximum": 99}, up={"type": "integer", "multipleOf": 5}),
    "numbers": record(p={"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
    "reference": {
        "$defs": {"leaf": record(v={"enum": [1, 2]}), "two": {"type": "array", "items": {"$ref": "#/$defs/leaf"}}},
        **record(pair={"allOf": [{"$ref": "#/$defs/two"}, {"minItems": 2, "maxItems": 2}]}),
    },
    "recursive": {
        "$defs": {"tree": record(v={"enum": [1, 2]}, left={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]})},
        "$ref": "#/$defs/tree",
    },
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": SHORT}, "additionalProperties": False},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
    "oneOf": {"oneOf": [record(k={"const": "a"}, v=SHORT), record(k={"const": "b"}, v={"type": "boolean"})]},
    "chinese": record(
        语言={"enum": ["中文", "日本語"]}, 表情={"const": "🙂👩‍👩‍👧"}, 字={"type": "string", "pattern": "^[一-龥]{2}$"}
    ),
}


@functools.cache
def sentencepiece() -> SentencePieceTokenizer:
    """Its masks have no place beyond the last token."""
    parts = [TEXT[i : i + 4000] for i in range(0, 100_000, 4000)]
    return SentencePieceTokenizer(train_sentencepiece([*parts, CHINESE * 20], "bpe", 608))


@pytest.fixture(params=["bytes", "sentencepiece", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "smollm2":
        found = named_tokenizer(str(request.getfixturevalue("smollm2_gguf")))
        assert found is not None
        return found
    return BYTES if request.param == "bytes" else sentencepiece()


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_answers_are_json_of_their_schema(tokenizer: Tokenizer) -> None:
    """All of them beside each other, so that none takes another's mask."""
    all_grammars = Grammars(tokenizer)
    grammars = {name: all_grammars.of_response(of_schema(schema)) for name, schema in SCHEMAS.items()}
    results = answers(tokenizer, grammars)
    assert results.keys() == SCHEMAS.keys()
    for name, result in results.items():
        assert (name, result.finish_reason) == (name, "end_of_text")
        assert result.tokens[-1] in tokenizer.stop_ids
        value = json.loads(result.text)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(value, SCHEMAS[name], jsonschema.Draft202012Validator, format_checker=checker)
        gaps = [line for line in result.text.splitlines() if not line.strip()]
        assert not gaps, "whitespace is bounded"


def test_any_object_is_json(tokenizer: Tokenizer) -> None:
    """Of which one may be cut, where it is too long; without any, the format changes nothing."""
    assert Grammars(tokenizer).of_response({"type": "text"}) is None
    grammar = Grammars(tokenizer).of_response({"type": "json_object"})
    assert grammar
    bias = tuple((token, 6.0) for token in sorted({i for c in '"}{' for i in tokenizer.encode(c)}))
    for result in answers(tokenizer, dict.fromkeys("abcdef", grammar), logit_bias=bias).values():
        if result.finish_reason == "length":
            assert result.text.startswith("{")
        else:
            assert isinstance(json.loads(result.text), dict)


def test_other_grammars() -> None:
    """A regular expression, and Lark's notation, in which tokens may be named; greedy as drawn."""
    grammars = {
        "regex": OF_BYTES.compiled(regex_grammar("(ja|nein)!{2,3}")),
        "lark": OF_BYTES.compiled(lark_grammar('start: "a" rest\nrest: "你好" | "b" rest | <[259]>')),
    }
    for filters in ({}, {"temperature": 0.0}):
        results = answers(BYTES, grammars, **filters)
        assert results["regex"].text.rstrip("!") in ("ja", "nein")
        assert results["lark"].text.rstrip("b")[0] == "a"
        assert results["lark"].text.lstrip("ab") in ("你好", "<|assistant|>")


def allowed(constraint: Any) -> set[int]:
    return {*np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")).tolist()}


def test_any_stop_id_ends_an_answer_where_it_may_end_and_only_there() -> None:
    assert len(BYTES.stop_ids) == 2
    constraint = OF_BYTES.compiled(regex_grammar("a[^b]?"))()
    assert allowed(constraint) == {97}
    constraint.take(97)
    there = allowed(constraint)
    assert there & {*BYTES.special_tokens.values()} == BYTES.stop_ids
    assert 98 not in there
    constraint.take(max(BYTES.stop_ids))
    with pytest.raises(UserError, match="the answer's grammar"):
        constraint.take(97)


def test_answers_of_one_grammar_do_not_know_each_other() -> None:
    grammar = OF_BYTES.compiled(regex_grammar("ab|cd"))
    first, second = grammar(), grammar()
    first.take(97)
    assert (allowed(first), allowed(second)) == ({98}, {97, 99})


def test_a_text_without_a_choice_is_cut_as_the_tokenizer_cuts_it() -> None:
    tokenizer = sentencepiece()
    text = "the models of 语言模型 predict the next word"
    constraint, tokens = Grammars(tokenizer).compiled(regex_grammar(text))(), []
    while not (ids := allowed(constraint)) & tokenizer.stop_ids:
        tokens.append(min(ids))
        constraint.take(tokens[-1])
    assert tokens == tokenizer.encode(text)


def deep() -> Iterator[dict[str, Any]]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    yield schema


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, "response_format has the type 'xml'; it may be text, json_object or json_schema"),
        ({"type": "json_schema"}, "has no json_schema with a schema, which is a JSON object"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": True}}, "has no json_schema with a schema"),
        (of_schema({"type": "foo"}), "response_format has a schema that cannot be used: Invalid type: foo"),
        (of_schema({"not": {}}), r'Unimplemented keys: \["not"\]'),
        (of_schema({"type": "string", "pattern": "(?=a)b"}), "look-around, including look-ahead"),
        (of_schema({"$ref": "http://127.0.0.1/x"}), "retrieving it failed: Default retriever does not fetch"),
        (of_schema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable schema"),
        (of_schema({"const": float("nan")}), "it is no JSON: Out of range float"),
        (of_schema({"const": "\ud800"}), "it is no JSON: 'utf-8' codec"),
        (of_schema({"enum": ["x" * 10] * 6000}), "it has 84,010 bytes, and 65,536 is the limit"),
        (of_schema(next(deep())), "recursion limit exceeded"),
        (of_schema({"type": "integer", "multipleOf": 999983}), "it takes more than 2 s or 1024 MiB to compile"),
    ],
    ids=lambda case: case[:20] if isinstance(case, str) else "",
)
def test_what_cannot_be_used_is_told_in_one_line(response_format: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        OF_BYTES.of_response(response_format)
    assert "\n" not in str(told.value)


def test_a_grammar_that_grows_too_large_as_it_goes_on_ends_its_answer() -> None:
    schema = {"type": "string", "pattern": "^(.*a.{200}|.*b.{200}|.*c.{300}d)$"}
    grammar, rng = OF_BYTES.of_response(of_schema(schema)), np.random.default_rng(0)
    assert grammar
    constraint = grammar()

    def go_on() -> None:
        constraint.take(ord('"'))
        while constraint.allowed().any():
            constraint.take(int(rng.choice([*b"abcd"])))

    with pytest.raises(UserError, match="the answer's grammar takes too long to follow") as told:
        go_on()
    assert "\n" not in str(told.value)
