"""The default: in a few minutes on a laptop's CPU, a small GPT that writes like Python's documentation."""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(n_layer=4, n_head=4, d_model=128, context_length=128),
    data=DataConfig(dir="data/python-docs", source=("python-docs",), vocab_size=2048, batch_size=12),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
    train=TrainConfig(steps=2000, eval_every=500, sample_every=500),
)
