"""A conversation in the terminal: history, streaming, and a few commands."""

from collections.abc import Callable

from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.sample.chat import Message, answer, check_chat, message
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer

HELP = (
    "/system TEXT  tell the model how to behave; /reset  begin anew; "
    "Ctrl-C  stop the answer, twice: leave; /exit, Ctrl-D  leave"
)


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
