"""From the words on a command line to an exit status.

What the user can mend is told in one line on standard error: exit status 2 for the arguments themselves, 1 for what
they lead to, 128 + the signal's number after a signal.
"""

import difflib
import gc
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType

from gpt_jax.cli.parse import UsageError
from gpt_jax.errors import UserError
from gpt_jax.system import restart_with_huge_pages

EXTRAS = {"tokenizers": "interop", "jinja2": "interop", "gguf": "interop", "google": "interop", "lm_eval": "lm-eval"}
"""Packages that not everybody needs, and the extra that has them. `google` is protobuf."""

USAGE = """usage: gpt-jax COMMAND [OPTIONS]

  prepare   turn text into token files
  train     train a GPT on them
  sample    let a trained GPT write
  eval      tell how well a GPT predicts a text
  export    write a run as a folder that transformers loads
  plan      tell whether a training fits a slice of TPUs or GPUs that is not here, and what bounds it

gpt-jax COMMAND --help tells the options of each."""

COMMANDS = ("prepare", "train", "sample", "eval", "export", "plan")
"""Each a module of this package, which is imported when it is called for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. With GPT_JAX_TRACEBACK set, errors are raised."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal that cannot show a character must not end the text.
    try:
        if command in ("-h", "--help"):
            print(USAGE)
            return 0
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"there is no command {command!r}{hint} The commands are {', '.join(COMMANDS)}")
        status: int = importlib.import_module(f"gpt_jax.cli.{command}").command(argv[1:])
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # The reader, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as e:
        line = user_message(e)
        if line is None or os.environ.get("GPT_JAX_TRACEBACK"):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def user_message(e: Exception) -> str | None:
    """What to tell the user of an exception, in one line; None where it is a bug, which needs its traceback."""
    if isinstance(e, UserError):
        return " ".join(str(e).split("\n"))  # Libraries, whose words it may hold, write more than one line.
    if isinstance(e, ModuleNotFoundError) and (package := (e.name or "").split(".")[0]) in EXTRAS:
        return f"this needs the package {package}, which is not installed: pip install 'gpt-jax[{EXTRAS[package]}]'"
    if isinstance(e, OSError) and e.errno is not None:  # A disk that is full or read-only, wherever it was met.
        return f"{e.filename}: {e.strerror}" if e.filename else os.strerror(e.errno)
    from gpt_jax import hosts  # Not before: it brings JAX, for which the messages above need not wait.

    if hosts.lost(e):
        return "another host has gone, see what it said; start all of them again, with --resume if there is a run"
    if isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
        return "the device has too little memory; set a smaller data.microbatch_size, or model.remat to full"
    return None


def interrupt(signum: int, frame: FrameType | None) -> None:
    """A handler of SIGINT that raises KeyboardInterrupt, but not where it would be lost.

    What is raised in a callback of the garbage collector, such as JAX has, is printed and forgotten: from there, the
    signal is sent again a little later.
    """
    if frame is not None and any(frame.f_code is getattr(found, "__code__", None) for found in gc.callbacks):
        threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
    else:
        raise KeyboardInterrupt


def run(argv: Sequence[str] | None = None) -> None:
    """`main` as a process of its own.

    A failure ends the process at once: after a failed save, the interpreter's own way out lets the abandoned threads
    and coroutines of the checkpoint library print their tracebacks below the one line that matters.
    """
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # And is not ignored, as of a background job.
        signal.signal(signal.SIGINT, interrupt)
    if argv and argv[0] == "train":
        restart_with_huge_pages()
    try:
        status = main(argv)
    except Exception:
        hosts = sys.modules.get("gpt_jax.hosts")
        if hosts is None or not hosts.several():
            raise
        traceback.print_exc()
        status = 1  # And at once: on its way out, JAX would wait for the other hosts, which wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
