"""GPT-2 124M on half a million tokens a step, for 19,073 steps: 10 billion tokens.

Prepare the data folder first, from a text that is large enough for 10 billion tokens, such as FineWeb:
gpt-jax prepare SOURCE --out data/web --vocab-size 50257 --val-fraction 0.001
"""

from gpt_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from gpt_jax.model.presets import GPT2

config = Config(
    model=GPT2,
    data=DataConfig(dir="data/web", batch_size=512, microbatch_size=16),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700),
    train=TrainConfig(steps=19_073, eval_every=1000),
)
