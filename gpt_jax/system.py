"""Facts and settings of the machine that are needed before JAX is imported, or without it."""

import os
import sys
from pathlib import Path


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """The folder of this user's downloads and compiled programs: gpt_jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax"


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
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **HUGE_PAGES})
