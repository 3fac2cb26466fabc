"""Conversations: their turns as tokens that fit the context, and the answer to the last one."""

import itertools
from collections.abc import Callable

from gpt_jax.errors import UserError
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.generate import generate_on
from gpt_jax.sample.replicas import Replicas
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import NO_CHAT, Tokenizer

Message = dict[str, str]


def check_chat(tokenizer: Tokenizer, system: str | None, context_length: int, max_new_tokens: int) -> None:
    """Raises UserError when there is no chat template, or the system prompt is too long, or not accepted by it."""
    if tokenizer.chat_template is None:
        raise UserError(NO_CHAT)
    fit(tokenizer, system, [message("user", "Hello")], context_length, max_new_tokens)


def answer(
    engine: Engine | Replicas,
    tokenizer: Tokenizer,
    settings: Settings,
    system: str | None,
    history: list[Message],
    say: Callable[[str], None],
) -> list[Message]:
    """Streams the answer to the last message of `history` to `say`. Returns the history with the answer. The engine
    reads what it has not read in an earlier answer.

    The returned history lacks the turns that did not fit, and the last message when a KeyboardInterrupt came before
    any text of its answer. Raises UserError when the last message alone does not fit.
    """
    pieces: list[str] = []

    def on_text(_: int, text: str) -> None:
        pieces.append(text)
        say(text)

    try:
        history, prompt = fit(tokenizer, system, history, engine.model.config.context_length, settings.max_new_tokens)
        generate_on(engine, tokenizer, [prompt], settings, on_text=on_text)
    except KeyboardInterrupt:
        if not pieces:
            say("\n")
            return history[:-1]
    say("\n")
    return [*history, message("assistant", "".join(pieces).strip())]


def beginning(tokenizer: Tokenizer, system: str | None, history: list[Message]) -> list[int]:
    """The tokens with which the prompt begins, whatever the user says next, as far as the template lets us know."""
    first, second = (tokenizer.encode_chat(conversation(system, [*history, message("user", s)])) for s in ("a", "b"))
    return [
        token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    ]


def fit(
    tokenizer: Tokenizer, system: str | None, history: list[Message], context_length: int, max_new_tokens: int
) -> tuple[list[Message], list[int]]:
    """The last turns of `history` that leave room for an answer, and their tokens.

    The answer's room is max_new_tokens, but at most half of the context. Raises UserError when the last message alone,
    or the system prompt, does not fit into the rest.
    """
    allowed = context_length - min(max_new_tokens, context_length // 2)
    while True:
        tokens = tokenizer.encode_chat(conversation(system, history))
        if len(tokens) <= allowed:
            return history, tokens
        if len(history) <= 1:
            n, what = len(tokens), "the message has"
            if system is not None:
                n_system = len(tokenizer.encode(system))
                what = "the system prompt and the message have"
                n, what = (n_system, "the system prompt has") if n_system > allowed else (n, what)
            raise UserError(f"{what} {n} tokens, and the context has room for {allowed} beside the answer; shorten it")
        history = history[2:]  # A question and its answer.


def conversation(system: str | None, history: list[Message]) -> list[Message]:
    """All messages, the system prompt first."""
    return ([] if system is None else [message("system", system)]) + history


def message(role: str, content: str) -> Message:
    """One message in the format of chat templates."""
    return {"role": role, "content": content}
