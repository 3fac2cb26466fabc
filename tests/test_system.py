"""What of the machine is asked for, and asked of it, before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpt_jax
from gpt_jax.system import HUGE_PAGES, command_line

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


PACKAGE = Path(gpt_jax.__file__).parent
CHECKOUT = PACKAGE.parent


@pytest.mark.parametrize(
    ("called", "command", "line"),
    [
        (["python", "-m", "gpt_jax"], "sample", "python -m gpt_jax sample --run 'my run'"),
        (
            [".venv/bin/python", "-X", "dev", "-m", "gpt_jax"],
            "sample",
            ".venv/bin/python -m gpt_jax sample --run 'my run'",
        ),
        (["python", "train.py"], "sample", "python sample.py --run 'my run'"),
        (["python3", "./sample.py"], "train", "python3 train.py --run 'my run'"),
        (["python", f"{CHECKOUT}/train.py"], "sample", f"python {CHECKOUT}/sample.py --run 'my run'"),
        (["python", "train.py"], "prepare", "python -m gpt_jax prepare --run 'my run'"),
        (["/usr/bin/python", "/opt/my tools/gpt-jax"], "sample", "'/opt/my tools/gpt-jax' sample --run 'my run'"),
        (["python", "elsewhere/train.py"], "sample", "python -m gpt_jax sample --run 'my run'"),
        (["python", "my_program.py"], "train", "python -m gpt_jax train --run 'my run'"),
        (["python", "-c"], "train", "python -m gpt_jax train --run 'my run'"),
        (["python", ""], "train", "python -m gpt_jax train --run 'my run'"),  # As in Python's own prompt.
    ],
    ids=str,
)
def test_a_command_is_named_as_it_was_called(
    called: list[str], command: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its arguments quoted for the shell."""
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(sys, "orig_argv", [*called, "a", "b"])
    monkeypatch.setattr(sys, "argv", [str(PACKAGE / "__main__.py") if called[-2] == "-m" else called[-1], "a", "b"])
    assert command_line(command, "--run", Path("my run")) == line


def test_an_installed_command_is_named_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "gpt-jax"
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(script)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line("train", "--out-dir", "$HOME") == "gpt-jax train --out-dir '$HOME'"
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command_line("train") == f"{script} train"
