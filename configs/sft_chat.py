"""A base model becomes one that answers: supervised tuning on conversations, of which the answers are learnt.

Prepare the conversations with the tokenizer of the base, and name the base, which is a run or a published model:

gpt-jax prepare chats.jsonl --out data/chats --tokenizer runs/base
python train.py configs/sft_chat.py --init-from runs/base
"""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="runs/base",
    model=ModelConfig(context_length=512),
    data=DataConfig(dir="data/chats", batch_size=8),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20),
    train=TrainConfig(steps=300, eval_every=50, sample_every=150, sample_tokens=64),
)
