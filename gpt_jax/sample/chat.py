"""A conversation in the terminal: history, streaming, and a few commands."""

import contextlib
import sys
from collections.abc import Callable

from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.sample.generate import Settings, generate_tokens
from gpt_jax.tokenizer.tokenizer import NO_CHAT, Tokenizer

HELP = (
    "/system TEXT  tell the model how to behave; /reset  begin anew; "
    "Ctrl-C  stop the answer, twice: leave; /exit, Ctrl-D  leave"
)

Message = dict[str, str]


def chat(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    settings: Settings,
    system: str | None,
    ask: Callable[[], str],
    say: Callable[[str], None],
) -> None:
    """Answers what `ask` returns until it raises EOFError, or KeyboardInterrupt twice; text for the user goes to `say`.

    A KeyboardInterrupt during an answer ends the answer: what was said of it stays in the conversation. When the
    conversation no longer fits into the context beside an answer, its oldest turns are forgotten; the system prompt is
    kept. Raises UserError when the tokenizer has no chat template, or when it does not take the system prompt.
    """
    check_chat(tokenizer, system)
    history: list[Message] = []
    interrupted = False  # Outside of an answer, just now: it may have been meant for one that had just ended.
    while True:
        try:
            text = ask().strip()
            interrupted = False
            command, _, argument = text.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                history.clear()
            elif command == "/system":
                system = argument.strip() or None
            elif command.startswith("/"):
                say(f"{HELP}\n")
            elif text:
                asked = [*history, message("user", text)]
                history = answer(model, params, tokenizer, settings, system, asked, say)
        except EOFError:
            return
        except UserError as e:
            say(f"error: {e}\n")
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            say(f"\n{HELP}\n")


def check_chat(tokenizer: Tokenizer, system: str | None) -> None:
    """Raises UserError when no conversation with that system prompt can be written."""
    if tokenizer.chat_template is None:
        raise UserError(NO_CHAT)
    tokenizer.encode_chat(conversation(system, [message("user", "Hello")]))


def answer(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    settings: Settings,
    system: str | None,
    history: list[Message],
    say: Callable[[str], None],
) -> list[Message]:
    """Says the answer to the last message of `history`, as it comes. Returns the history with it.

    What was forgotten for want of room is not in there, nor is a message to which nothing was said before a
    KeyboardInterrupt. Raises UserError when the last message alone does not fit.
    """
    pieces: list[str] = []

    def on_text(_: int, text: str) -> None:
        pieces.append(text)
        say(text)

    try:
        history, prompt = fit(tokenizer, system, history, model.config.context_length, settings.max_new_tokens)
        generate_tokens(model, params, tokenizer, [prompt], settings, on_text=on_text)
    except KeyboardInterrupt:
        if not pieces:
            say("\n")
            return history[:-1]
    say("\n")
    return [*history, message("assistant", "".join(pieces).strip())]


def fit(
    tokenizer: Tokenizer, system: str | None, history: list[Message], context_length: int, max_new_tokens: int
) -> tuple[list[Message], list[int]]:
    """The last turns of `history` that leave room for an answer, and their tokens.

    The room is max_new_tokens, but never more than half of the context. Raises UserError when the last message alone is
    longer than what is left.
    """
    allowed = context_length - min(max_new_tokens, context_length // 2)
    while True:
        tokens = tokenizer.encode_chat(conversation(system, history))
        if len(tokens) <= allowed:
            return history, tokens
        if len(history) <= 1:
            raise UserError(
                f"the message has {len(tokens)} tokens, and the context has room for {allowed} beside the answer; "
                "shorten it"
            )
        history = history[2:]  # A question and its answer.


def conversation(system: str | None, history: list[Message]) -> list[Message]:
    """All messages, the system prompt first."""
    return ([] if system is None else [message("system", system)]) + history


def message(role: str, content: str) -> Message:
    """One message, in the terms of chat templates."""
    return {"role": role, "content": content}


def ask_terminal() -> str:
    """A line from standard input, edited with a history where that is a terminal. Raises EOFError at its end."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # It is there once it is imported.
    return input("> ")


def say_terminal(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)
