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
    """Answers messages from `ask` until it raises EOFError, or KeyboardInterrupt twice. `say` shows text to the user.

    A KeyboardInterrupt during an answer ends the answer, and its text so far stays in the conversation. When the
    conversation leaves no room for an answer in the context, its oldest turns are forgotten; the system prompt is
    kept. Raises UserError when the tokenizer has no chat template, or the template does not accept the system prompt.
    """
    check_chat(tokenizer, system)
    history: list[Message] = []
    interrupted = False  # By one Ctrl-C at the prompt, which may have been meant for an answer that had just ended.
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
