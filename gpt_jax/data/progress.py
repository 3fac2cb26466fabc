"""Progress bars of what reads a corpus."""

from typing import Any

from tqdm import tqdm


def progress_bar(label: str, total: int, unit: str = "B") -> "tqdm[Any]":
    """A bar that shows the rate, such as MB/s, and the time left, on a terminal only."""
    return tqdm(total=total, desc=f"{label:<10}", unit=unit, unit_scale=True, disable=None)
