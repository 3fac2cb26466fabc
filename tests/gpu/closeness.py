"""How far a result in bfloat16 may be from the same in float32."""

import numpy as np

ROUNDING = 2.0**-8
"""bfloat16 has 8 significant bits: rounding changes a number by this share of it at most."""


def assert_close(ours: np.ndarray, expected: np.ndarray, roundings: float, n_axes: int = 1) -> None:
    """The vectors along the last `n_axes` axes differ in length from the expected ones by so many roundings at most, of
    their own length and of the mean one: where many terms cancel, what is left of their rounding is not small."""
    assert np.all(np.isfinite(ours))
    axes = tuple(range(-n_axes, 0))
    errors, lengths = (np.sqrt(np.sum(np.square(x), axis=axes)) for x in (ours - expected, expected))
    worst = np.max(errors / (lengths + np.mean(lengths))) / ROUNDING
    assert worst <= roundings, f"{worst:.2f} roundings"
