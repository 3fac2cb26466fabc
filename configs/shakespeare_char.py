"""nanoGPT's baby GPT: tiny Shakespeare by characters. Its README reports a best validation loss of 1.47."""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    model=ModelConfig(n_layer=6, n_head=6, d_model=384, context_length=256, dropout=0.2, bias=False),
    data=DataConfig(dir="data/shakespeare-char", source=("shakespeare",), model_type="char", batch_size=64),
    optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.99),
    train=TrainConfig(steps=5000, eval_every=250),
)
