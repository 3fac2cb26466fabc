"""GPT-2 xl (1.5B) on half a million tokens a step, as gpt2_124m.py trains the smallest one."""

from gpt_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from gpt_jax.model.presets import GPT2_XL

config = Config(
    model=GPT2_XL,
    data=DataConfig(dir="data/web", batch_size=512, microbatch_size=4),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=700),
    train=TrainConfig(steps=19_073, eval_every=1000),
)
