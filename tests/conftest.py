"""Runs the suite on eight simulated CPU devices, set up as a user's run is."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# All processes of a run of the tests (workers of pytest-xdist, and the commands that they start) share compiled
# programs, small ones too, and leave the user's alone. The first process makes the folder, and its workers inherit it.
# JAX reads both variables when it is imported.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Threads of OpenMP, which are torch's, spin while they wait for each other. Where several processes share the cores,
# they wait for long: 2,400 small products took 20 seconds of two cores beside two busy processes, and 1.2 like this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax

from gpt_jax import runtime
from tests.commands import OLDER_GENERATOR, run_here
from tests.llama_cpp import llama_cpp_vocabularies  # noqa: F401
from tests.llamafactory import llamafactory_data  # noqa: F401
from tests.smollm2 import smollm2_gguf  # noqa: F401

# The first example of a test compiles, so the time of one says nothing; in CI, the same examples every time.
settings.register_profile("gpt_jax", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("gpt_jax")

# Compiling takes the processes of the tests a third less time by the older of XLA's generators of code for CPUs, too.
# Commands in processes of their own use the one that users get, and so does everything where XLA_FLAGS is set.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", OLDER_GENERATOR)

runtime.setup(cpu_devices=8)

# A shell ignores SIGINT for what it starts in the background, and so would the commands that these tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="every n-th of the selected tests, from the k-th on")


@pytest.hookimpl(trylast=True)  # After -m and -k.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = map(int, config.getoption("--part").split("/"))
    chosen = items[k - 1 :: n]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k - 1])
    items[:] = chosen


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lets workers take tests that are neighbours, which share what their module makes, and steal from each other at
    the end, unless --dist asks for something else."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session", autouse=True)
def quick_compilation() -> None:
    """XLA:CPU leaves out LLVM's optimisations in the processes of the tests, where a program runs a few times only:
    compiling takes nine tenths of their time, and a third as long like this.

    Commands in processes of their own compile as a user's do, but for the modules that use `quick_commands`; so does
    everything with JAX_DISABLE_MOST_OPTIMIZATIONS=0.
    """
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def programs_are_few() -> Iterator[None]:
    """Forgets compiled programs where a process has many. Each takes several of the parts of memory that Linux counts,
    of which a process has 65,530 at most; one that loads a program beyond that is ended by a segmentation fault."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_commands() -> Iterator[None]:
    """Commands in processes of their own compile as quickly as the processes of the tests, in a module that uses this:
    for commands that compile for longer than they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1"))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder of bytes, made by the command."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "语言", "rain"]
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 200)), encoding="utf-8")
    run_here("prepare", folder, "--out", folder / "prepared", "--tokenizer", "bytes")
    return folder / "prepared"
