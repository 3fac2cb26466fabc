"""Who may import whom: pyproject.toml has the layers, and here they are held to."""

import graphlib
import subprocess
import sys

import grimp
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.commands import ROOT


def test_imports_run_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those within functions count, too."""
    monkeypatch.chdir(ROOT)
    assert lint_imports() == EXIT_STATUS_SUCCESS


def test_no_module_imports_itself_by_others() -> None:
    graph = grimp.build_graph("gpt_jax", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # Raises CycleError, with the circle.


def test_importing_the_package_takes_no_library() -> None:
    code = "import sys; before = set(sys.modules); import gpt_jax; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported <= {"gpt_jax", *sys.stdlib_module_names}
