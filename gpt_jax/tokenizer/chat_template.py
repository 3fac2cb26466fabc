"""Conversations as text, by the Jinja templates of published chat models."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from gpt_jax.errors import UserError


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to the start of the next answer.

    special_tokens: names of tokens by the template's variables for them, such as bos_token. Raises UserError when the
    template is invalid or refuses the conversation.
    """
    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except UserError:
        raise
    except Exception as e:  # A template is a program by others, which may fail in any way.
        raise UserError(f"the chat template refuses this conversation: {' '.join(str(e).split())}") from e


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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json  # Jinja's own filter escapes HTML.
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
