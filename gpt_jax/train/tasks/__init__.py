"""What runs learn from, one file each."""

from gpt_jax.config import Config
from gpt_jax.data.folders import DataFolders
from gpt_jax.data.preferences import PairFolder
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement
from gpt_jax.train.tasks.pairs import PairTask
from gpt_jax.train.tasks.rewards import RewardSource, RewardTask
from gpt_jax.train.tasks.task import Task
from gpt_jax.train.tasks.texts import TextTask

Source = DataFolders | PairFolder | RewardSource
"""What a run learns from, open for reading, before devices are used."""


def make_task(config: Config, source: Source, model: GPT, placement: Placement) -> Task:
    """The task of a run. Raises UserError when there is too little to learn from, or it does not divide over the
    devices."""
    if isinstance(source, PairFolder):
        return PairTask(config, source, model, placement)
    if isinstance(source, RewardSource):
        return RewardTask(config, source, model, placement)
    return TextTask(config, source, model, placement)
