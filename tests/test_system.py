"""What of the machine is asked for, and asked of it, before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.system import HUGE_PAGES

PROGRAM = """
import os, sys
from gpt_jax.system import restart_with_huge_pages
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), *sys.argv[1:])
"""


@pytest.mark.parametrize("given", [{}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_a_restart_keeps_process_and_arguments_and_what_the_user_chose(given: dict[str, str]) -> None:
    environment = {**{name: x for name, x in os.environ.items() if name not in HUGE_PAGES}, **given}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "a b", "--c"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate(timeout=60)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    restarts = not given and setting.exists() and "[madvise]" in setting.read_text()
    expected = HUGE_PAGES["GLIBC_TUNABLES"] if restarts else given.get("GLIBC_TUNABLES")
    assert process.returncode == 0
    assert out.split() == [str(expected), str(process.pid), "a", "b", "--c"]
