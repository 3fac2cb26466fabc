"""No parity, no timing: the contestants must compute the same before they are timed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.worker import Worker
from gpt_jax.errors import UserError

STEPS = 10

TOLERANCES = {
    # Of the loss, relative; of each array's gradient, the norm of the difference over the norm; of the losses of ten
    # optimizer steps on one batch, relative. bfloat16 has eight bits.
    "float32": {"loss": 1e-5, "gradients": 1e-4, "losses": 1e-4},
    "bfloat16": {"loss": 2e-3, "gradients": 5e-2, "losses": 1e-2},
}


class Computed(NamedTuple):
    """What a contestant computes from the initial parameters."""

    gradients: dict[str, np.ndarray]
    losses: np.ndarray


def compute(worker: Worker, folder: Path) -> Computed:
    """Gradients of the first batch by path, and the losses of ten optimizer steps on it. Raises FailedError.

    The contestant starts with the initial parameters before and after.
    """
    path = folder / "gradients.npz"
    worker.ask("start")
    worker.ask("write_gradients", path=str(path), batch=0)
    with np.load(path) as arrays:
        gradients = dict(arrays)
    losses = np.array(worker.ask("losses", batch=0, count=STEPS))
    worker.ask("start")
    return Computed(gradients, losses)


def compare(ours: Computed, theirs: Computed) -> dict[str, float]:
    """The largest differences, measured as in TOLERANCES; nan where anything is.

    Raises UserError where one side has gradients that the other has not.
    """
    one_sided = ours.gradients.keys() ^ theirs.gradients.keys()
    if one_sided:
        raise UserError(f"only one of the two has gradients of {', '.join(sorted(one_sided))}")
    of_losses = np.abs(ours.losses - theirs.losses) / theirs.losses
    return {
        "loss": float(of_losses[0]),
        # NumPy's max: Python's own drops a nan that is not the first.
        "gradients": float(np.max([distance(ours.gradients[path], array) for path, array in theirs.gradients.items()])),
        "losses": float(of_losses.max()),
    }


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference, relative to the norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check(differences: dict[str, float], dtype: str, what: str) -> None:
    """Raises UserError when a difference is larger than it may be; `what` says what was compared."""
    for name, difference in differences.items():
        tolerance = TOLERANCES[dtype][name]
        if not difference <= tolerance:
            raise UserError(
                f"{what} do not compute the same, so they are not timed: {name} differ by {difference:.1e}, "
                f"and {tolerance:.0e} is allowed in {dtype}"
            )
