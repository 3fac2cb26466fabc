"""Preferences: of two answers to a prompt, the chosen one becomes more probable. SmolLM2-135M-Instruct, by adapters.

Prepare the pairs with the tokenizer of the model, and name that, a folder, a .gguf file, or a name on the hub:

gpt-jax prepare pairs.jsonl --format preference --out data/pairs --tokenizer MODEL
python train.py configs/dpo.py --init-from MODEL
"""

from gpt_jax.config import Config, DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="HuggingFaceTB/SmolLM2-135M-Instruct",
    model=ModelConfig(context_length=1024, lora=LoraConfig(rank=8, alpha=16.0)),
    data=DataConfig(dir="data/pairs", batch_size=4, microbatch_size=1),
    objective=ObjectiveConfig(name="dpo"),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5, weight_decay=0.0),
    train=TrainConfig(steps=40, eval_every=20, log_every=1),
)
