"""Calls of tools: what clients offer, how a model's chat template writes a call, and calls in the text of an answer.

A model calls tools as its chat template writes calls, which the template shows when it is given one. The same line says
how calls are read, and what an answer must be that has to call a tool.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.serve.grammar import WHITESPACE, Grammar, Grammars, as_json, lark_grammar
from gpt_jax.tokenizer.chat_template import Chat

MOST_TOOLS = 128
NAME = "[a-zA-Z0-9_-]{1,64}"

# The signs of a format: marks, words of JSON, and single characters. There may be some white space between them.
_SIGN = re.compile(r'"?\$\w+"?|<[^>]+>|\[[A-Z_]+\]|"\w+"|\S')
_SPACE = re.compile(r"\s{0,40}")
# What stands for a sign, and its beginnings.
_VARIABLES = {
    sign: (re.compile(whole), re.compile(beginning))
    for sign, whole, beginning in (
        ("$NAME", NAME, "[a-zA-Z0-9_-]{0,64}"),
        ('"$NAME"', f'"{NAME}"', '("[a-zA-Z0-9_-]{0,64})?'),
        ("$ID", "[a-zA-Z0-9]{1,64}", "[a-zA-Z0-9]{0,64}"),
        ('"$ID"', '"[^"]{0,64}"', '("[^"]{0,64})?'),
    )
}


@dataclass(frozen=True)
class Format:
    """How a family of models calls tools."""

    call: str  # $NAME, $ARGUMENTS, a JSON object, and $ID, nine letters or digits, stand for its own.
    between: str = ""  # Calls.
    begin: str = ""  # The first call.
    end: str = ""  # The last one.
    mark: str = ""  # What may stand before the first call.
    is_single: bool = False  # Templates take one call in an answer.

    @property
    def head(self) -> str:
        """A call up to its arguments."""
        return self.call.partition("$ARGUMENTS")[0]

    @property
    def tail(self) -> str:
        """A call after its arguments."""
        return self.call.partition("$ARGUMENTS")[2]


FORMATS = {
    # Of Hermes, Qwen2.5, Qwen3, Granite 4, and of the tokenizers made here.
    "hermes": Format('<tool_call>\n{"name": "$NAME", "arguments": $ARGUMENTS}\n</tool_call>', "\n"),
    # Llama's, from 3.1 on.
    "llama": Format('{"name": "$NAME", "parameters": $ARGUMENTS}', mark="<|python_tag|>", is_single=True),
    # Mistral's, of three generations.
    "mistral": Format('{"name": "$NAME", "arguments": $ARGUMENTS}', ", ", "[TOOL_CALLS][", "]"),
    "mistral_id": Format("[TOOL_CALLS]$NAME[CALL_ID]$ID[ARGS]$ARGUMENTS"),
    "mistral_args": Format("[TOOL_CALLS]$NAME[ARGS]$ARGUMENTS"),
}


def format_of(chat: Chat) -> Format | None:
    """The format in which a chat template writes calls; None when it is none of these, or no tools are shown to the
    model."""
    id, name = "a" * 9, "probe"
    tool = {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": NOTHING}}
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": {"x": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": id, "content": "1"},
    ]
    try:
        asked, called = (chat.shown(chat.render(some, [tool], asks=True)) for some in (messages[:1], messages))
    except UserError:
        return None
    for format in FORMATS.values():
        written = Template(format.begin + format.head).substitute(NAME=name, ID=id) + '{"x": 1}'
        if written in called and name in asked:
            return format
    return None


NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""The parameters of a function that names none."""


def check_tools(tools: Sequence[Any]) -> None:
    """Raises UserError for what are no tools of OpenAI's protocol, or too many, or too large ones."""
    if len(tools) > MOST_TOOLS:
        raise UserError(f"there are {len(tools)} tools, and {MOST_TOOLS} is the limit")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise UserError(f"tools[{i}] is no object with the type function, and a function")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise UserError(f"tools[{i}] has the name {name!r:.80}; it takes 1 to 64 letters, digits, _ and -")
        if name in names:
            raise UserError(f"tools[{i}] has the name {name}, as one before it")
        if not isinstance(function.get("description"), str | None):
            raise UserError(f"tools[{i}] has a description that is no text")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise UserError(f"tools[{i}] has parameters that are no JSON object")
        names.add(name)
    try:
        as_json(tools)
    except UserError as e:
        raise UserError(f"the tools cannot be used: {e}") from None


def forced(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, format: Format, grammars: Grammars, parallel: bool = True
) -> Grammar | None:
    """What an answer has to be that must call a tool: with the choice "required" one of them, with an object the one
    that it names. None with "auto" and "none", by which nothing has to be.

    tools: see `check_tools`. parallel: there may be several calls. Raises UserError for another choice, and for
    parameters that are no schema, or not supported.
    """
    functions = [tool["function"] for tool in tools]
    if tool_choice in (None, "auto", "none"):
        return None
    if tool_choice != "required":
        named = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
        if not isinstance(named, Mapping) or tool_choice.get("type") != "function":
            raise UserError("tool_choice is auto, none, required, or an object with the type function, and a function")
        functions = [function for function in functions if function["name"] == named.get("name")]
        if not functions:
            raise UserError(f"tool_choice names the function {named.get('name')!r:.80}, which is not among the tools")
    if not functions:
        raise UserError("tool_choice is required, and there are no tools")

    special = grammars.tokenizer.special_tokens

    def text(written: str, name: str = "") -> str:
        """A part of a call in Lark's notation, in which special tokens are named by their ids."""
        parts = filter(None, re.split(r"(<[^>]+>|\[[A-Z_]+\]|\$ID)", written))
        return " ".join(
            f"<[{special[part]}]>"
            if part in special
            else "/[a-zA-Z0-9]{9}/"
            if part == "$ID"
            else json.dumps(part.replace("$NAME", name))
            for part in parts
        )

    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    more = f"({text(format.between)} (calls))*" if parallel and not format.is_single else ""
    rules = [f"start: {text(format.begin)} calls {more} {text(format.end)}", f"calls: {calls}"]
    for i, function in enumerate(functions):
        schema = function.get("parameters") or NOTHING
        schema = {"type": "object", **schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        if schema["type"] != "object":
            raise UserError(f"the parameters of {function['name']} are of type {schema['type']!r:.40}, and not object")
        rules += [f"call_{i}: {text(format.head, function['name'])} %json {as_json(schema)} {text(format.tail)}"]
    try:
        return grammars.compiled(lark_grammar("\n".join(rules)))
    except UserError as e:
        raise UserError(f"the parameters of a tool cannot be used: {e}") from None


def for_template(messages: Sequence[Mapping[str, Any]], format: Format | None) -> list[dict[str, Any]]:
    """OpenAI's messages as chat templates expect them: arguments that are the text of a JSON object as that object, and
    what is null left out. Mistral's first formats take only ids of nine letters and digits.

    Raises UserError for calls of another form. What else is wrong with messages, the template's rendering tells.
    """
    has_ids = format in (FORMATS["mistral"], FORMATS["mistral_id"])
    changed = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is no object with a role and a content")
        message = {key: value for key, value in message.items() if value is not None and (value or key != "tool_calls")}
        if isinstance(message.get("tool_call_id"), str) and has_ids:
            message["tool_call_id"] = short_id(message["tool_call_id"])
        if "tool_calls" in message:
            message["tool_calls"] = [_call(call, has_ids, number) for call in _listed(message["tool_calls"], number)]
            message.setdefault("content", "")
        changed.append(message)
    return changed


def _listed(calls: Any, number: int) -> list[Any]:
    if not isinstance(calls, list):
        raise UserError(f"message {number} has tool_calls that are no list")
    return calls


def _call(call: Any, has_ids: bool, number: int) -> dict[str, Any]:
    """A call for `for_template`."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"message {number} has a call without a function that has a name")
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        arguments = value if isinstance(value, dict) else arguments
    changed = {**call, "function": {"name": function["name"], "arguments": arguments}}  # In the order of templates.
    if has_ids:
        changed["id"] = short_id(str(call.get("id")))
    return changed


def short_id(id: str) -> str:
    """An id of nine letters and digits for any other; one of that form is its own."""
    return id if re.fullmatch("[a-zA-Z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]


@dataclass(frozen=True)
class Content:
    """Text of an answer outside of calls."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the arguments of a call, which are the text of a JSON object."""

    index: int
    text: str


Piece = Content | Call | Arguments


def random_id() -> str:
    """An id for a call."""
    return f"call_{secrets.token_hex(12)}"


class ToolParser:
    """Reads the calls in an answer, as its text comes.

    Text that may turn out to be the beginning of a call is held back. What is no call after all is content, also where
    it looks like one. Once the arguments of a call have begun, what follows up to the end of that object belongs to
    them, be it JSON or not. White space before a call is left out.

    most: of so many calls, what follows the last one is left out, see `is_done`; one where the format takes no more.
    """

    def __init__(self, format: Format, new_id: Callable[[], str] = random_id, most: int | None = None) -> None:
        head, tail = [*_SIGN.findall(format.head), "{"], _SIGN.findall(format.tail)
        self._heads = [[*_SIGN.findall(mark + format.begin), *head] for mark in {"", format.mark}]
        self._next = [*_SIGN.findall(format.between), *head]
        self._end = _SIGN.findall(format.end)
        self._tails = [tail, [*_SIGN.findall(', "id": "$ID"'), *tail], tail[1:]]  # Models may forget a brace.
        self.new_id, self.most = new_id, 1 if format.is_single else most
        self.held, self.n_calls = "", 0
        self.is_done = False  # True when as many calls have been read as may be.
        self._has_begun = False  # True when there was content, or a call.
        self._go_on = self._content

    def push(self, text: str) -> list[Piece]:
        """Takes text, and returns what is certain."""
        self.held += text
        return self._pieces(False)

    def flush(self) -> list[Piece]:
        """What was held back, at the end."""
        return self._pieces(True)

    def _pieces(self, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._go_on(pieces, is_last):
            pass
        return pieces

    # Each of these takes from the text that is held, and says whether another one is to go on at once.

    def _content(self, pieces: list[Piece], is_last: bool) -> bool:
        """Text up to a call."""
        for i in range(len(self.held)):
            for head in self._heads if not self.held[i].isspace() else ():
                if head[0] == "{" and (self._has_begun or self.held[:i].strip()):
                    continue  # Without a mark, calls are all of an answer.
                end, name = match(head, self.held, i)
                if end == MORE and not is_last:
                    self._say(pieces, i)
                    return False
                if end not in (MORE, None):
                    rest = self.held[end - 1 :]
                    self._say(pieces, i)
                    return self._begin(pieces, name, rest)
        self._say(pieces, len(self.held))
        if is_last:
            pieces += [Content(self.held)] if self.held and not self.n_calls else []
            self.held = ""
        return False

    def _say(self, pieces: list[Piece], n: int) -> None:
        """Takes n characters as content, but for the white space at their end."""
        if text := self.held[:n].rstrip():
            pieces.append(Content(text))
            self.held, self._has_begun = self.held[len(text) :], True

    def _begin(self, pieces: list[Piece], name: str, rest: str) -> bool:
        """Begins a call, with its arguments at the beginning of the rest."""
        pieces.append(Call(self.n_calls, self.new_id(), name))
        self.held, self._has_begun = rest, True
        self.n_calls += 1
        self._depth, self._is_string, self._is_escaped = 0, False, False
        self._go_on = self._arguments
        return True

    def _arguments(self, pieces: list[Piece], is_last: bool) -> bool:
        """A JSON object, which ends with its last bracket, or before a sign that JSON has within strings only."""
        end = None
        for i, c in enumerate(self.held):
            if self._is_string:
                self._is_string = c != '"' or self._is_escaped
                self._is_escaped = c == "\\" and not self._is_escaped
            elif c == "<":
                end = i
            else:
                self._is_string = c == '"'
                self._depth += (c in "{[") - (c in "}]")
                end = None if self._depth else i + 1
            if end is not None:
                break
        if text := self.held[:end]:
            pieces.append(Arguments(self.n_calls - 1, text))
        self.held = self.held[len(text) :]
        self._go_on = self._arguments if end is None else self._tail
        return end is not None

    def _tail(self, pieces: list[Piece], is_last: bool) -> bool:
        """The rest of a call, as far as it is there."""
        for signs in self._tails:
            end, _ = match(signs, self.held, 0)
            if end == MORE and not is_last:
                return False
            if end is not None:
                self.held = "" if end == MORE else self.held[end:]
                break
        self.is_done = self.n_calls == self.most
        self._go_on = self._nothing if self.is_done else self._after
        return True

    def _after(self, pieces: list[Piece], is_last: bool) -> bool:
        """Another call, or the end of the calls, or none of both."""
        for signs in (self._next, self._end):
            end, name = match(signs, self.held, 0)
            if end == MORE and not is_last:
                return False
            if end not in (MORE, None):
                rest = self.held[end:]
                if signs is not self._end:
                    return self._begin(pieces, name, f"{{{rest}")
                self.held = rest
                break
        self._go_on = self._content
        return True

    def _nothing(self, pieces: list[Piece], is_last: bool) -> bool:
        """What is left out."""
        self.held = ""
        return False


MORE = -1


def match(signs: Sequence[str], text: str, at: int) -> tuple[int | None, str]:
    """Where in a text signs end that begin at a place, and the name among them. MORE where the text ends before them,
    None where they do not stand there."""
    name = ""
    for sign in signs:
        if space := _SPACE.match(text, at):
            at = space.end()
        if sign in _VARIABLES:
            whole, beginning = _VARIABLES[sign]
            found = whole.match(text, at)
            if beginning.fullmatch(text, at):
                return MORE, ""
            if not found:
                return None, ""
            at = found.end()
            name = found[0].strip('"') if "NAME" in sign else name
        elif text.startswith(sign, at):
            at += len(sign)
        else:
            return (MORE if sign.startswith(text[at:]) else None), ""
    return at, name
