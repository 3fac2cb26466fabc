"""Copies of a run's records in TensorBoard and Weights & Biases, optional packages that the configuration asks for."""

import secrets
from typing import Protocol

from gpt_jax.config import Config, config_to_dict
from gpt_jax.errors import UserError
from gpt_jax.run.folder import RunFolder


class Tracker(Protocol):
    """A destination of the numbers of logged steps."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Takes the numbers of one step, by name."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in the run's folder. Points after step `start`, left by a run that was killed, are hidden."""

    def __init__(self, run: RunFolder, start: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard needs tensorboardX: pip install 'gpt-jax[tensorboard]'") from None
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else None)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """See Tracker."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Tracker."""
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run with the folder's name, which goes on when the run is resumed."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb_project needs wandb: pip install 'gpt-jax[wandb]'") from None
        if not run.wandb_id.exists():
            run.wandb_id.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            project=config.train.wandb_project,
            name=run.place.name,
            id=run.wandb_id.read_text(),
            resume="allow",
            config=config_to_dict(config),
            dir=str(run.path),
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """See Tracker."""
        self.run.log(scalars, step=step)

    def close(self) -> None:
        """See Tracker."""
        self.run.finish()


def open_trackers(run: RunFolder, config: Config, start: int) -> list[Tracker]:
    """The trackers that the configuration asks for. Raises UserError when the package of one is not installed."""
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(run, start))
    if config.train.wandb_project:
        trackers.append(WeightsAndBiases(run, config))
    return trackers
