"""A conversation in the terminal: history, streaming, and a few commands."""

from collections.abc import Callable
from contextlib import suppress

from gpt_jax.cli.terminal import print_error
from gpt_jax.errors import UserError
from gpt_jax.sample.chat import Message, answer, beginning, check_chat, message
from gpt_jax.sample.engine import Engine
from gpt_jax.sample.replicas import Replicas
from gpt_jax.sample.settings import Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer

HELP = (
    "/system TEXT  tell the model how to behave; /reset  begin anew; /help  print this; "
    "Ctrl-C  stop the answer, twice: leave; /exit, Ctrl-D  leave"
)


def chat(
    engine: Engine | Replicas,
    tokenizer: Tokenizer,
    settings: Settings,
    system: str | None,
    ask: Callable[[], str],
    say: Callable[[str], None],
) -> bool:
    """Answers messages from `ask` until it raises EOFError, or KeyboardInterrupt twice. `say` shows text to the user.

    Only the commands of HELP, as they stand there, are commands: any other line that begins with "/" is a message, such
    as /no_think, or a path. Errors are printed on standard error, and the conversation goes on; returns False if there
    was one.
    A KeyboardInterrupt during an answer ends the answer, and its text so far stays in the conversation. When the
    conversation leaves no room for an answer in the context, its oldest turns are forgotten; the system prompt is
    kept. Raises UserError when the tokenizer has no chat template, or the system prompt is too long or not accepted.
    """
    T, n = engine.model.config.context_length, settings.max_new_tokens
    check_chat(tokenizer, system, T, n)
    history: list[Message] = []
    succeeds = True
    interrupted = False  # By one Ctrl-C at the prompt, which may have been meant for an answer that had just ended.
    while True:
        try:
            if history:  # The device reads the last answer while the user writes, so that the next one begins sooner.
                with suppress(UserError):  # The template may take no other turn, which is to be told of that turn.
                    engine.read(beginning(tokenizer, system, history))
            text = ask().strip()
            interrupted = False
            if not text:
                continue
            command, *argument = text.split(maxsplit=1)
            if text == "/exit":
                return succeeds
            if text == "/reset":
                history.clear()
            elif text == "/help":
                say(f"{HELP}\n")
            elif command == "/system":
                asked_for = argument[0] if argument else None
                check_chat(tokenizer, asked_for, T, n)
                system = asked_for
            else:
                asked = [*history, message("user", text)]
                history = answer(engine, tokenizer, settings, system, asked, say)
        except EOFError:
            return succeeds
        except UserError as e:
            print_error(str(e))
            succeeds = False
        except KeyboardInterrupt:
            if interrupted:
                return succeeds
            interrupted = True
            say(f"\n{HELP}\n")
