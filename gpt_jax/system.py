"""Facts and settings of the machine that are needed before JAX is imported, or without it."""

import errno
import os
import shlex
import shutil
import sys
from pathlib import Path


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """The folder of this user's downloads and compiled programs: gpt_jax in XDG_CACHE_HOME, or in ~/.cache.

    Raises OSError for a user without a home folder, as in a container under a number that has no name.
    """
    folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gpt_jax"
    if folder.parts[0].startswith("~"):
        raise OSError(errno.ENOENT, "this user has no home folder; set XDG_CACHE_HOME", str(folder))
    return folder


def user_path(name: str) -> Path:
    """The path that a user names, in which ~ is the home folder; ~ stays where there is none, or no such user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path.expanduser raises then.


def shows_color() -> bool:
    """True if standard output is a terminal with colours, and the user has not set NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def open_closed_streams() -> None:
    """Opens /dev/null as standard input, output or error where the caller has closed it, as with >&- in a shell.

    Call it before any file is opened: the first one would get the descriptor, and what C code and child processes print
    would be written to that file.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115  # With the lowest free descriptor.
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def command_line(command: str, *args: object) -> str:
    """The line for a shell that runs a command of this project with `args`, called in the way this program was called:
    as gpt-jax, as train.py or sample.py, or as python -m gpt_jax."""
    called, python = Path((sys.argv or [""])[0]), (sys.orig_argv or ["python"])[0]
    checkout = Path(__file__).resolve().parents[1]
    script = called.parent / f"{command}.py"
    if called.stem == "gpt-jax":
        words = [called.stem if shutil.which(called.stem) == str(called) else str(called), command]
    elif called.name in ("train.py", "sample.py") and called.resolve().parent == checkout and script.exists():
        words = [python, str(script)]
    else:
        words = [python, "-m", "gpt_jax", command]
    return shlex.join([*words, *map(str, args)])


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment variables with which glibc requests pages of 2 MiB, where the kernel grants them on request."""


def restart_with_huge_pages() -> None:
    """Restarts this program with HUGE_PAGES, under the same process id; returns if they would have no effect.

    XLA:CPU allocates the buffers of every step anew, and the kernel clears them page by page: GPT-2 124M took 290,000
    faults of 4 KiB and 1560 ms a step, with HUGE_PAGES 1,000 and 1215 ms. glibc reads the setting once, before main().
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = setting.exists() and "[madvise]" in setting.read_text()
    if on_request and not any(name in os.environ for name in HUGE_PAGES) and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **HUGE_PAGES})
