"""Host memory to load a published model, to restore a state that is divided otherwise, and to prepare a text."""

from pathlib import Path

import pytest

from benchmarks.corpora import write_texts
from tests.benchmarks import loading, preparing, restoring

pytestmark = pytest.mark.slow


def test_loading_takes_the_memory_of_the_parameters(tmp_path: Path) -> None:
    """No second copy: half of one of these 200 MB would be seen."""
    n_bytes = loading.write_model(tmp_path, n_layer=2, n_head=8, d_model=768)
    taken = loading.load("gpt_jax", tmp_path)
    assert taken["peak_bytes"] - taken["before"] < 1.5 * n_bytes


@pytest.mark.exhaustive
def test_restoring_takes_little_more_memory_than_the_state(tmp_path: Path) -> None:
    """GPT-2 124M, written by one device and restored to a mesh that divides it in eight; 1.13 times was measured."""
    restoring.work("save", "one device", True, tmp_path / "checkpoints")
    taken = restoring.work("restore", "fsdp 8", False, tmp_path / "checkpoints")
    assert taken["state_bytes"] > 12 * 124e6
    assert taken["peak_bytes"] < 1.3 * taken["state_bytes"]


@pytest.mark.exhaustive
def test_preparing_takes_as_much_memory_for_a_longer_text(tmp_path: Path) -> None:
    """Texts of 32 and 80 MiB: half of the difference would be seen. The largest process took 131 to 155 MiB."""
    peaks = []
    for mib in (32, 80):
        corpus = tmp_path / f"{mib}.jsonl"
        write_texts(corpus, mib << 20)
        peaks.append(preparing.prepare(corpus, tmp_path / str(mib))["peak_mib_largest_process"])
    assert peaks[1] < peaks[0] + 24
