"""The default: in a few minutes on a laptop's CPU, a small GPT that writes like Python's documentation."""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(n_layer=4, n_head=4, d_model=256, context_length=128),
    data=DataConfig(dir="data/python-docs", source=("python-docs",), vocab_size=2048, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
    train=TrainConfig(steps=450, eval_every=150, sample_every=150),
)
