"""Conversations as text, by the Jinja templates of published chat models, and as tokens.

Within a rendered text, five of Unicode's noncharacters, which no text has, keep apart what looks alike: special tokens
that the template writes, and their names in what people wrote.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count, pairwise
from typing import Any, NoReturn

from gpt_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")  # OpenAI's, some of which a template may refuse.
# Rounds of loops and calls of macros in one rendering, which take a second; 1,000 messages take some thousands.
MAX_ROUNDS = 200_000

CONTROL, NAME, END, LEARN, LEARNT = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4"
"""Special token 7 is CONTROL 7 END, and its name in a message NAME 7 END. LEARN and LEARNT are around what the model is
to learn, where a template says so by {% generation %}."""

# A conversation in which everyone is answered, in the special tokens of the tokenizers made here. Calls of tools are
# written as Qwen2.5 and Hermes write them.
TEMPLATE = """{%- if tools or (messages and messages[0].role in ('system', 'developer')) -%}
    <|system|>
    {%- if messages and messages[0].role in ('system', 'developer') -%}{{ messages[0].content }}{%- endif -%}
    {%- if tools -%}
        {{ '\\n\\nTools:\\n<tools>' }}
        {%- for tool in tools -%}{{ '\\n' + (tool | tojson) }}{%- endfor -%}
        {{ '\\n</tools>' }}
    {%- endif -%}
    <|end|>
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        <|user|>{{ message.content }}<|end|>
    {%- elif message.role == 'tool' -%}
        <|user|>{{ '<tool_response>\\n' + message.content + '\\n</tool_response>' }}<|end|>
    {%- elif message.role == 'assistant' -%}
        <|assistant|>{% generation %}{{ message.content }}
        {%- for call in message.tool_calls or [] -%}
            {{ '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n' + ((call.function or call) | tojson) + '\\n</tool_call>' }}
        {%- endfor -%}
        <|end|>{% endgeneration %}
    {%- elif not loop.first -%}
        <|system|>{{ message.content }}<|end|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@dataclass(frozen=True)
class Chat:
    """How a tokenizer writes conversations."""

    template: str  # In Jinja.
    variables: Mapping[str, str]  # Names of tokens by the template's variables for them, such as bos_token.
    special_tokens: Mapping[str, int]  # Ids by name.
    # Ids of the parts of a text, one after the other, in which special tokens are CONTROL i END, with i an index of
    # `special_tokens`. A part is encoded apart from the one before it, but as what follows it.
    encode: Callable[[Sequence[str]], list[list[int]]]
    now: Callable[[], datetime] = datetime.now  # For templates that write the date.

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids of a conversation up to the start of the next answer. See Tokenizer.encode_chat."""
        hidden, tools = self.checked(messages), self.hidden(tools)
        text = self.render(hidden, tools, asks=True)
        return [i for ids in self.encode(split(text, borders(self.requests(hidden, tools), text))) for i in ids]

    def requests(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> dict[int, str]:
        """For the index of each answer in messages that were `checked`, what the model read before it wrote it. There
        is none for an answer that the template does not ask for, such as one without messages before it."""
        found = {}
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                with suppress(UserError):
                    found[i] = self.render(messages[:i], tools, asks=True)
        return found

    def checked(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages for `render`; see `checked` below."""
        return checked(messages, self._hidden)

    def hidden(self, value: Any) -> Any:
        """A value of JSON for `render`, in which names of special tokens are NAME i END."""
        return _plain_value(value, self._hidden, "the tools")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, asks: bool, marks: bool = False) -> str:
        """The text of messages that were `checked`, with CONTROL i END for special tokens of the template.

        asks: it ends where the next answer begins. marks: with LEARN and LEARNT. Raises UserError when the template is
        invalid, refuses the conversation, or does not end. The sandbox keeps a template from files, classes and the
        network; it bounds neither the memory nor the time that one operator or filter takes.
        """
        rounds = count(1)

        def next_round() -> None:
            if next(rounds) > MAX_ROUNDS:
                raise RuntimeError(f"it takes more than {MAX_ROUNDS:,} rounds of its loops")

        try:
            text: str = _compiled(self.template).render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=asks,
                **self.variables,
                strftime_now=lambda format: self.now().strftime(format),
                _next_round=next_round,
            )
        except UserError:
            raise
        except Exception as e:  # A template is a program by others, which may fail in any way.
            why = self.shown(" ".join(str(e).split())) or type(e).__name__
            raise UserError(f"the chat template refuses this conversation: {why}") from e
        if not marks:
            text = text.replace(LEARN, "").replace(LEARNT, "")
        return self._names.sub(lambda m: self._codes[m[0]], text) if self._codes else text

    def plain(self, text: str) -> str:
        """A rendered text in which names in messages are what they were, for `encode`."""
        return _NAME.sub(lambda m: self._all_names[int(m[1])], text) if NAME in text else text

    def shown(self, text: str) -> str:
        """A rendered text with all names, as `decode` gives it."""
        return CONTROL_TOKEN.sub(lambda m: self._all_names[int(m[1])], self.plain(text))

    def _hidden(self, text: str) -> str:
        """A text of a message with NAME i END for names of special tokens."""
        if found := _NONCHARACTER.search(text):
            raise UserError(f"a message holds U+{ord(found[0]):04X}, which Unicode reserves for programs; take it out")
        return self._names.sub(lambda m: self._codes[m[0]].replace(CONTROL, NAME), text) if self._codes else text

    @functools.cached_property
    def marks(self) -> bool:
        """True when the template says by {% generation %} what is to be learnt."""
        return re.search(r"\{%[-+]?\s*generation\b", self.template) is not None

    @functools.cached_property
    def _all_names(self) -> list[str]:
        return list(self.special_tokens)

    @functools.cached_property
    def _codes(self) -> dict[str, str]:
        return {name: control(i) for i, name in enumerate(self._all_names) if name}

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._codes, key=len, reverse=True))))


_NONCHARACTER = re.compile(f"[{CONTROL}{NAME}{END}{LEARN}{LEARNT}]")
CONTROL_TOKEN = re.compile(f"{CONTROL}([0-9]+){END}")
_NAME = re.compile(f"{NAME}([0-9]+){END}")
_ESCAPED = re.compile(r"\\u(fdd[0-4])")  # As JSON writes noncharacters in ASCII.


def control(i: int) -> str:
    """Special token i in a rendered text."""
    return f"{CONTROL}{i}{END}"


def borders(requests: Mapping[int, str], text: str) -> list[int]:
    """Where answers begin in `text`: after each request that it begins with. The model wrote an answer after the text
    before it, so that no token is on both sides. There is no border where the template rewrote that text since."""
    return sorted({len(request) for request in requests.values() if text.startswith(request)} - {0})


def split(text: str, borders: Sequence[int]) -> list[str]:
    """The parts of a text between borders, which ascend."""
    return [text[start:end] for start, end in pairwise([0, *borders, len(text)])]


def checked(messages: Sequence[Mapping[str, Any]], plain: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages for a template: every text in them, at any depth, goes through `plain`, which takes the names of
    special tokens out of it. `train`, which is not for templates, is left out.

    Content given as OpenAI's list of text parts is joined by newlines, as vLLM and llama.cpp's server do for templates
    that expect a text. Raises UserError for a role that is not one of ROLES, and for content of another kind.
    """

    rendered = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is no object with a role and a content")
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {message.get('role')!r:.60}; the roles are {', '.join(ROLES)}")
        others = {key: value for key, value in message.items() if key != "train"}
        joined = {**others, "content": _content(message, where)}
        rendered.append({**_plain_value(joined, plain, where), "role": message["role"]})
    return rendered


def _plain_value(value: Any, plain: Callable[[str], str], where: str) -> Any:
    """A value of JSON with `plain` of every text in it."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {_plain_value(key, plain, where): _plain_value(item, plain, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item, plain, where) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(f"{where} has a value of type {type(value).__name__}, which is not JSON")


def _content(message: Mapping[str, Any], where: str) -> str:
    """The content of a message as one text. It may be missing where the message calls tools."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list | tuple):
        raise UserError(f"{where} has a content of type {type(content).__name__}; it must be a text or a list of texts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part of type {kind!r:.60} in its content; only text is supported")
        texts.append(part["text"])
    return "\n".join(texts)


def syntax_error(template: str) -> str:
    """What is wrong with a template, and where; empty if it can be compiled."""
    import jinja2

    try:
        _compiled(template)
    except jinja2.TemplateSyntaxError as e:
        return f"{e.message}, in line {e.lineno}"
    return ""


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template compiled for the environment publishers expect: Jinja's sandbox, with transformers' additions."""
    import jinja2  # Here, since most commands need no template.
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the model's text for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return [_output(LEARN), *body, _output(LEARNT)]

    def _output(text: str) -> nodes.Node:
        return nodes.Output([nodes.TemplateData(text)])

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
        return _ESCAPED.sub(lambda m: chr(int(m[1], 16)), text) if ensure_ascii else text

    class Bounded(ImmutableSandboxedEnvironment):
        """The sandbox, for templates that would not end: it counts rounds of loops and calls of macros."""

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            template = super()._parse(source, name, filename)
            for block in template.find_all((nodes.For, nodes.Macro)):
                call = nodes.Call(nodes.Name("_next_round", "load"), [], [], None, None)
                block.body.insert(0, nodes.ExprStmt(call).set_lineno(block.lineno))
            return template

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json  # Jinja's own filter escapes HTML.
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
