"""What the tests of the benchmarks share."""

import os

import pytest

from benchmarks import worker


@pytest.fixture
def quick_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants compile as the processes of the tests do: without LLVM's optimisations, and what is the same once."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setitem(worker.ENVIRONMENT, "JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"] + "/torch")
    monkeypatch.delitem(worker.ENVIRONMENT, "TORCHINDUCTOR_FORCE_DISABLE_CACHES")
