"""Conversations as text, by the Jinja templates of published chat models."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import Any, NoReturn

from gpt_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")  # OpenAI's, some of which a template may refuse.
# Rounds of loops and calls of macros in one rendering, which take a second; 1,000 messages take some thousands.
MAX_ROUNDS = 200_000


def render(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to the start of the next answer.

    special_tokens: names of tokens by the template's variables for them, such as bos_token. Raises UserError when the
    template is invalid, refuses the conversation, or does not end. The sandbox keeps a template from files, classes and
    the network; it bounds neither the memory nor the time that one operator or filter takes.
    """
    rounds = count(1)

    def next_round() -> None:
        if next(rounds) > MAX_ROUNDS:
            raise RuntimeError(f"it takes more than {MAX_ROUNDS:,} rounds of its loops")

    try:
        text: str = _compiled(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
            _next_round=next_round,
        )
        return text
    except UserError:
        raise
    except Exception as e:  # A template is a program by others, which may fail in any way.
        why = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"the chat template refuses this conversation: {why}") from e


def checked(messages: Sequence[Mapping[str, Any]], plain: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages for a template: every text in them, at any depth, goes through `plain`, which takes the names of
    special tokens out of it.

    Content given as OpenAI's list of text parts is joined by newlines, as vLLM and llama.cpp's server do for templates
    that expect a text. Raises UserError for a role that is not one of ROLES, and for content of another kind.
    """

    def plain_value(value: Any, where: str) -> Any:
        if isinstance(value, str):
            return plain(value)
        if isinstance(value, Mapping):
            return {plain_value(key, where): plain_value(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain_value(item, where) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise UserError(f"{where} has a value of type {type(value).__name__}, which is not JSON")

    rendered = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is no object with a role and a content")
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {message.get('role')!r:.60}; the roles are {', '.join(ROLES)}")
        joined = {**message, "content": _content(message.get("content"), where)}
        rendered.append({**plain_value(joined, where), "role": message["role"]})
    return rendered


def _content(content: Any, where: str) -> str:
    """The content of a message as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{where} has a content of type {type(content).__name__}; it must be a text or a list of texts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part of type {kind!r:.60} in its content; only text is supported")
        texts.append(part["text"])
    return "\n".join(texts)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template compiled for the environment publishers expect: Jinja's sandbox, with transformers' additions."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("a chat template needs the package jinja2: pip install 'gpt-jax[interop]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the model's text for training; rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

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
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
