"""No parity, no timing: the contestants must compute the same before they are timed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.contestants import read_arrays
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
    """What a contestant computes from the initial parameters: gradients by path, and losses."""

    gradients: dict[str, np.ndarray]
    losses: np.ndarray


def compute(worker: Worker, folder: Path) -> Computed:
    """Gradients of the first batch, and the losses of ten optimizer steps on it; starts anew before and after."""
    path = str(folder / "gradients.npz")
    worker.ask("start")
    worker.ask("write_gradients", path=path, batch=0)
    losses = np.array(worker.ask("losses", batch=0, count=STEPS))
    worker.ask("start")
    return Computed(read_arrays(path), losses)


def compare(ours: Computed, theirs: Computed) -> dict[str, float]:
    """The largest differences, measured as in TOLERANCES; nan where anything is.

    Raises UserError where one side has gradients that the other has not.
    """
    if one_sided := ours.gradients.keys() ^ theirs.gradients.keys():
        raise UserError(f"only one of the two has gradients of {', '.join(sorted(one_sided))}")
    norm = np.linalg.norm
    of_gradients = [norm(ours.gradients[path] - array) / norm(array) for path, array in theirs.gradients.items()]
    of_losses = np.abs(ours.losses - theirs.losses) / theirs.losses
    # NumPy's max: Python's own drops a nan that is not the first.
    return {"loss": float(of_losses[0]), "gradients": float(np.max(of_gradients)), "losses": float(of_losses.max())}


def check(differences: dict[str, float], dtype: str, what: str) -> None:
    """Raises UserError when a difference is larger than it may be; `what` says what was compared."""
    for name, difference in differences.items():
        tolerance = TOLERANCES[dtype][name]
        if not difference <= tolerance:
            raise UserError(
                f"{what} do not compute the same, so they are not timed: {name} differ by {difference:.1e}, "
                f"and {tolerance:.0e} is allowed in {dtype}"
            )
