"""What of the machine is asked for before, and without, JAX."""

import os
import sys
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where this user's downloads and compiled programs are kept: gpt_jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_jax"


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc asks the kernel for pages of 2 MiB, where the kernel gives them to those who ask."""


def restart_with_huge_pages() -> None:
    """Starts this program anew in that environment, under the same process id; returns where that is of no use.

    XLA:CPU allocates the buffers of every step anew, and the kernel clears them page by page: 290,000 pages of 4 KiB a
    step of GPT-2 124M, 1560 ms, against 1,000 page faults and 1215 ms. glibc reads the setting once, before main().
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    wanted = setting.exists() and "[madvise]" in setting.read_text()
    if wanted and not any(name in os.environ for name in HUGE_PAGES) and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **HUGE_PAGES})
