"""Runs the command that a command line names, and returns its exit status.

Errors that the user can fix are printed as one line on standard error. The exit status is 2 for wrong arguments, 1 for
other errors, and 128 + the signal's number after a signal.
"""

import contextlib
import difflib
import errno
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
from gpt_jax.cli.terminal import print_error
from gpt_jax.errors import UserError
from gpt_jax.system import open_closed_streams, restart_with_huge_pages

SERVE = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")
EXTRAS = {"tokenizers": "interop", "gguf": "interop", "google": "interop", "lm_eval": "lm-eval"}
EXTRAS |= dict.fromkeys(SERVE, "serve")
"""Optional packages, and the extra that installs each. `google` is protobuf."""

USAGE = """usage: gpt-jax COMMAND [OPTIONS]

  prepare   turn text into token files
  inspect   show what is in them, and what training sees at a step
  train     train a GPT on them
  sample    let a trained GPT write
  serve     answer over HTTP, by OpenAI's protocol, with a chat page
  eval      tell how well a GPT predicts a text
  examples  write problems of an environment with their answers, to learn from
  solve     tell how many problems of an environment a GPT solves
  export    write a run as a folder that transformers loads
  plan      tell whether a training run fits TPUs or GPUs that are not here, and what bounds its time

gpt-jax COMMAND --help tells the options of each."""

COMMANDS = ("prepare", "inspect", "train", "sample", "serve", "eval", "examples", "solve", "export", "plan")
"""Each one is a module of this package, which is imported when the command runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. With GPT_JAX_TRACEBACK set, errors are raised."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A character that the terminal lacks must not raise.
    try:
        if command in ("-h", "--help"):
            print(USAGE, flush=True)
            return 0
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"there is no command {command!r}{hint} The commands are {', '.join(COMMANDS)}")
        status: int = importlib.import_module(f"gpt_jax.cli.{command}").command(argv[1:])
        sys.stdout.flush()  # Here, where errors of writing are told.
        return status
    except KeyboardInterrupt as e:
        return interrupted(e)
    except BrokenPipeError:  # The reader, such as head, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as e:
        if os.environ.get("GPT_JAX_TRACEBACK"):
            raise
        line = user_message(e)
        if line is None and (cause := interrupt_behind(e)):
            return interrupted(cause)
        if line is None:
            raise
        print_error(line)
        return 2 if isinstance(e, UsageError) else 1


def user_message(e: Exception) -> str | None:
    """The message of an exception for the user; None for a bug, which needs its traceback."""
    if isinstance(e, UserError):
        return str(e)
    if isinstance(e, ModuleNotFoundError) and (package := (e.name or "").split(".")[0]) in EXTRAS:
        return f"this needs the package {package}, which is not installed: pip install 'gpt-jax[{EXTRAS[package]}]'"
    if isinstance(e, OSError) and e.errno is not None:  # Such as a full or read-only disk, at any point.
        if e.errno == errno.ENOENT and not e.filename:  # From getcwd().
            return "the working folder does not exist any more; change to one that does"
        return f"{e.filename}: {e.strerror}" if e.filename else os.strerror(e.errno)
    from gpt_jax import hosts  # Here, since it imports JAX, which the cases above do not need.

    if hosts.lost(e):
        return "another host has gone, see what it said; start all of them again, with --auto-resume"
    if isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
        train = "train with a smaller data.microbatch_size, or model.remat full"
        return f"the device has too little memory; {train}; sample with fewer --slots, or a smaller --context-length"
    return None


def interrupted(e: KeyboardInterrupt) -> int:
    """Says that the command was interrupted, if somebody reads it; returns the exit status."""
    with contextlib.suppress(OSError):
        print("\ninterrupted", file=sys.stderr, flush=True)
    return 128 + signal_of(e)


def signal_of(e: KeyboardInterrupt) -> int:
    """The signal because of which it was raised."""
    signum: int = e.args[0] if e.args else signal.SIGINT
    return signum


def interrupt_behind(e: BaseException | None) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt because of which an exception was raised, as C code does that an interrupt reaches."""
    return e if e is None or isinstance(e, KeyboardInterrupt) else interrupt_behind(e.__cause__ or e.__context__)


noticed = threading.Event()
"""Set when Python has called `interrupt`, which it does between two of its own instructions only."""


def interrupt(signum: int, frame: FrameType | None) -> None:
    """A handler of signals that raises KeyboardInterrupt(signum). Where Python drops that, see `interrupt_again`."""
    noticed.set()
    raise KeyboardInterrupt(signum)


def interrupt_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Python's hook for exceptions that it drops: those that are raised in destructors, in callbacks of weak
    references, and in callbacks of its garbage collector, of which JAX has one. After an interrupt, sends the signal
    again a little later."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal_of(dropped.exc_value))).start()
    else:
        sys.__unraisablehook__(dropped)


SECONDS_TO_NOTICE = 2.0


def end_soon_after_signals() -> None:
    """Ends the process when a signal is to `interrupt` it, and C code does not let Python notice for two seconds, as in
    a compilation, which takes minutes, or while it waits for other hosts. Nothing is lost: what is written then takes
    its place at the end, or never.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # C code writes the number of the signal there, at once.

    def watch() -> None:
        while True:
            [signum] = os.read(read, 1)
            if signal.getsignal(signum) is interrupt and not noticed.wait(SECONDS_TO_NOTICE):
                os._exit(interrupted(KeyboardInterrupt(signum)))
            noticed.clear()

    threading.Thread(target=watch, daemon=True).start()


def run(argv: Sequence[str] | None = None) -> None:
    """Runs `main` as the whole of a process.

    A failure ends the process at once: after a failed save, a normal exit of the interpreter would let abandoned
    threads and coroutines of the checkpoint library print their tracebacks below the one line that matters.
    """
    open_closed_streams()
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Background jobs ignore SIGINT.
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = interrupt_again
    if argv and argv[0] == "train":
        restart_with_huge_pages()
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, interrupt)
        end_soon_after_signals()
    try:
        status = main(argv)
    except Exception:
        hosts = sys.modules.get("gpt_jax.hosts")
        if hosts is None or not hosts.several():
            raise
        traceback.print_exc()
        status = 1  # With os._exit below: in a normal exit, JAX would wait for the other hosts, which wait for this.
    with contextlib.suppress(OSError):  # Of a full disk, which was told.
        sys.stdout.flush()
        sys.stderr.flush()
    if status:
        os._exit(status)
