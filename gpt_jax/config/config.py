"""An experiment: all sections of the configuration together."""

import dataclasses
from dataclasses import dataclass, field

from gpt_jax.config.check import check
from gpt_jax.config.model import ModelConfig
from gpt_jax.config.objective import ObjectiveConfig
from gpt_jax.config.training import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """An experiment: everything that decides the outcome of a run."""

    out_dir: str = ""  # Folder of the run; empty: runs/ plus the configuration file's name.
    # Model to start from, with its architecture: a run, a folder with safetensors, a .gguf file, a name on the hub.
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        has_base = self.model.lora.rank == 0 or self.init_from != ""
        check(has_base, "model.lora.rank", self.model.lora.rank, "0 without init_from, a model to put adapters on")
        name = self.objective.name
        check(name == "next_token" or self.init_from != "", "objective.name", name, "next_token without init_from")
        prompt, allowed = self.train.sample_prompt, f"empty with {name}, whose samples answer what is held out"
        check(name == "next_token" or not prompt, "train.sample_prompt", prompt, allowed)
        if name == "grpo":
            self._check_grpo()

    def _check_grpo(self) -> None:
        grpo, model = self.objective.grpo, self.model
        check(not self.data.mixture, "data.mixture", self.data.mixture, "empty with grpo, whose data are problems")
        for dropout_name, dropout in (("model.dropout", model.dropout), ("model.lora.dropout", model.lora.dropout)):
            check(not dropout, dropout_name, dropout, "0 with grpo: answers are drawn without it, by another policy")
        for name in ("steps", "eval_every", "checkpoint_every", "sample_every"):
            value, allowed = getattr(self.train, name), f"a multiple of objective.grpo.iterations = {grpo.iterations}"
            check(value % grpo.iterations == 0, f"train.{name}", value, allowed)
        size = self.train.eval_batch_size
        check(not size, "train.eval_batch_size", size, "0 with grpo, whose answers are drawn in slots of their own")
        is_filtered = grpo.top_p < 1 or grpo.top_k > 0
        allowed = "1 with objective.grpo.top_p or top_k, which need all logits of a token on one device"
        check(not is_filtered or self.parallel.tensor <= 1, "parallel.tensor", self.parallel.tensor, allowed)


def with_vocabulary(config: Config, n_tokens: int) -> Config:
    """The configuration, with a vocabulary size of 0 replaced by the tokenizer's number of tokens.

    Raises UserError when the model's vocabulary is smaller than the tokenizer's. That of a model in init_from was
    compared with its own tokenizer, and may lack special tokens that no text has.
    """
    if config.init_from and config.model.vocab_size:
        return config
    if config.model.vocab_size == 0:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=n_tokens))
    allowed = f"at least the {n_tokens} tokens of the tokenizer in {config.data.dir}, or 0"
    check(config.model.vocab_size >= n_tokens, "model.vocab_size", config.model.vocab_size, allowed)
    return config
