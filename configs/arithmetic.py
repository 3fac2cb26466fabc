"""A small model that goes on with lines such as "3+5-9=-1", of which most in its text are wrong: a start for rewards.

gpt-jax examples --environment arithmetic --options digits=1 terms=3 --n 8000 --wrong 0.6 --out sums.jsonl
gpt-jax prepare sums.jsonl --out data/sums --tokenizer bytes
"""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(n_layer=4, n_head=4, d_model=128, context_length=32),
    data=DataConfig(dir="data/sums", packing="documents", batch_size=64),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=TrainConfig(steps=800, eval_every=200),
)
