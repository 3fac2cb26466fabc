"""Progress bars of what reads a corpus."""

from typing import Any

from tqdm import tqdm


def progress_bar(label: str, n_bytes: int) -> "tqdm[Any]":
    """A bar that shows MB/s and the time left, on a terminal only."""
    return tqdm(total=n_bytes, desc=f"{label:<10}", unit="B", unit_scale=True, disable=None)
