"""A published model fine-tuned on tiny Shakespeare by adapters: SmolLM2-135M with 2.2 million trained parameters.

Name the model that you have: python train.py configs/finetune_shakespeare.py --init-from FOLDER
"""

from gpt_jax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="HuggingFaceTB/SmolLM2-135M",
    model=ModelConfig(context_length=256, lora=LoraConfig(rank=8, alpha=16.0)),
    data=DataConfig(dir="data/shakespeare-finetune", source=("shakespeare",), batch_size=4),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup_steps=10, weight_decay=0.0),
    train=TrainConfig(steps=200, eval_every=50, log_every=5),
)
