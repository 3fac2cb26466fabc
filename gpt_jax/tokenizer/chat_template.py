"""Conversations as text, by the Jinja templates that models made for chat are published with."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from gpt_jax.errors import UserError


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the next answer begins.

    special_tokens: names of tokens by their part, such as bos_token, which templates refer to. Raises UserError when
    the template refuses the conversation, and when it is no template.
    """
    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except UserError:
        raise
    except Exception as e:  # The template is a program of someone else's, which may fail in any way.
        raise UserError(f"the chat template refuses this conversation: {' '.join(str(e).split())}") from e


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template in the environment that publishers write for: Jinja's sandbox, with what transformers adds to it."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("a chat template needs the package jinja2: pip install 'gpt-jax[interop]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks what the model wrote for training: shown as it is."""

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
    environment.filters["tojson"] = to_json  # Jinja's own escapes what HTML would misread.
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
