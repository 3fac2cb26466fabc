"""Who may import whom: pyproject.toml has the layers, and here they are held to."""

import graphlib
import subprocess
import sys

import grimp

from tests.commands import ROOT


def test_imports_run_downwards() -> None:
    """Those within functions count, too. In a process of its own, since import-linter sets up logging for all."""
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout


def test_no_module_imports_itself_by_others() -> None:
    graph = grimp.build_graph("gpt_jax", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # Raises CycleError, with the circle.


def test_importing_the_package_takes_no_library() -> None:
    code = "import sys; before = set(sys.modules); import gpt_jax; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported <= {"gpt_jax", *sys.stdlib_module_names}
