"""Which cases of a test run every time, and which in turns."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

EXHAUSTIVE = pytest.mark.exhaustive


def cases(every: Iterable[Any], standing: Collection[Any]) -> list[Any]:
    """All cases of a test as pytest's parameters, of which all but `standing`, which stand for them, are exhaustive."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in standing else EXHAUSTIVE)
        for case in every
    ]
