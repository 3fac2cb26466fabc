"""What a run learns from, as the loop sees it: batches, an objective, an evaluation, and what there is to tell."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import Params
from gpt_jax.train.objectives import Objective
from gpt_jax.train.step import TrainState

Feed = Callable[[int, TrainState], tuple[Batch, dict[str, float]]]
"""`(step, state)` to the batch of a step, counted from 0, on the devices, and what is to be logged of it. Called once
for each step, in order."""


class Task(Protocol):
    """A run's data together with what is done with them."""

    @property
    def objective(self) -> Objective:
        """What training minimises."""

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of a checkpoint that say what it was trained on, see `run.checkpoint.data_facts`."""

    @property
    def unit(self) -> str:
        """What `data.batch_size` counts, for messages."""

    @property
    def n_micro(self) -> int:
        """The microbatches of each share of a batch."""

    @property
    def tokens_per_step(self) -> int:
        """The places of all rows of a step; 0 where their number is not known before."""

    @property
    def steps_a_batch(self) -> int:
        """The steps that are taken on each batch; only after all of them can a run be saved."""

    def describe(self) -> dict[str, str]:
        """Rows of the table that is printed before training."""

    def begin(self, state: TrainState, meta: dict[str, Any]) -> None:
        """What has to be done once the state is there. meta: the facts of its checkpoints."""

    def feed(self, steps: range) -> AbstractContextManager[Feed]:
        """What makes the batches of these steps."""

    def epochs(self, step: int) -> dict[str, float]:
        """The epochs of each source that `step` steps have passed, by its name."""

    def evaluate(self, params: Params, step: int) -> dict[str, float]:
        """What is logged of held-out data: `val_loss`, and more."""

    def sample(self, params: Params, step: int) -> str:
        """A text that shows what the model writes; empty on all hosts but the first."""
