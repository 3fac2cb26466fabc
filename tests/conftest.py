"""Runs the suite on eight simulated CPU devices, set up as a user's run is."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# The tests, and the commands that they start, share compiled programs, and leave the user's alone. JAX reads it early.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt_jax-tests-")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from gpt_jax import runtime  # noqa: E402
from tests.commands import run  # noqa: E402
from tests.smollm2 import smollm2_gguf  # noqa: E402, F401

# The first example of a test compiles, so the time of one says nothing; in CI, the same examples every time.
settings.register_profile("gpt_jax", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("gpt_jax")

runtime.setup(cpu_devices=8)

# A shell ignores SIGINT for what it starts in the background, and so would the commands that these tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
    run("prepare", folder, "--out", folder / "prepared", "--tokenizer", "bytes")
    return folder / "prepared"
