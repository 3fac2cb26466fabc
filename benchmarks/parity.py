"""No parity, no timing: the contestants must compute the same before they are timed."""

from collections.abc import Mapping

import numpy as np

from benchmarks.contestants import Arrays
from gpt_jax.errors import UserError

STEPS = 10

TOLERANCES = {
    # Of the loss, relative; of each array's gradient, the norm of the difference over the norm; of the losses of ten
    # optimizer steps on one batch, relative. bfloat16 has eight bits.
    "float32": {"loss": 1e-5, "gradients": 1e-4, "losses": 1e-4},
    "bfloat16": {"loss": 2e-3, "gradients": 5e-2, "losses": 1e-2},
}

Computed = tuple[Arrays, list[float]]
"""What a contestant computes from the initial parameters: gradients by path, and losses of STEPS steps on one batch."""


def compare(ours: Computed, theirs: Computed) -> dict[str, float]:
    """The largest differences, measured as in TOLERANCES; nan where anything is.

    Raises UserError where one side has gradients that the other has not.
    """
    (gradients, losses), (their_gradients, their_losses) = ours, theirs
    if one_sided := gradients.keys() ^ their_gradients.keys():
        raise UserError(f"only one of the two has gradients of {', '.join(sorted(one_sided))}")
    norm = np.linalg.norm
    of_gradients = [norm(gradients[path] - array) / norm(array) for path, array in their_gradients.items()]
    of_losses = np.abs(np.array(losses) / their_losses - 1)
    # NumPy's max: Python's own drops a nan that is not the first.
    return {"loss": float(of_losses[0]), "gradients": float(np.max(of_gradients)), "losses": float(of_losses.max())}


def check(differences: Mapping[str, float], tolerances: Mapping[str, float], other: str) -> None:
    """Raises UserError when a difference of gpt_jax and another contestant is larger than it may be."""
    for name, difference in differences.items():
        if not difference <= tolerances[name]:
            raise UserError(
                f"gpt_jax and {other} do not compute the same, so they are not timed: {name} differ by "
                f"{difference:.1e}, and {tolerances[name]:.1g} is allowed"
            )
