"""nanoGPT's CPU recipe: tiny Shakespeare by characters, a minute on two cores, validation loss 1.80.

Only the learning rate differs from nanoGPT's: with its 1e-3, nanoGPT's model in PyTorch and this one end at 1.90 on the
whole validation set (the 1.88 of its README is an estimate from twenty batches).
"""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(n_layer=4, n_head=4, d_model=128, context_length=64, bias=False),
    data=DataConfig(dir="data/shakespeare-char", source=("shakespeare",), model_type="char", batch_size=12),
    optimizer=OptimizerConfig(learning_rate=2e-3, beta2=0.99),
    train=TrainConfig(steps=2000, eval_every=500),
)
