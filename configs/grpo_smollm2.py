"""Rewards: SmolLM2-135M-Instruct learns to add and subtract, by adapters, from a task of reasoning-gym, which is
installed by pip install 'gpt-jax[rl]'.

First it learns from examples to write its answer between tags, since an answer without tags gets no reward. Name the
model, a folder, a .gguf file, or a name on the hub:

gpt-jax examples --environment reasoning-gym:chain_sum --options min_terms=2 max_terms=2 min_digits=1 max_digits=2 \
    --template "<answer>{answer}</answer>" --n 400 --out sums.jsonl
gpt-jax prepare sums.jsonl --out data/sums --tokenizer MODEL
python train.py configs/sft_chat.py --init-from MODEL --model.lora.rank 8 --data.dir data/sums --data.batch-size 2 \
    --train.steps 20 --optimizer.warmup-steps 3 --out-dir runs/sums
python train.py configs/grpo_smollm2.py
"""

from gpt_jax.config import (
    Config,
    DataConfig,
    GrpoConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

config = Config(
    init_from="runs/sums",
    model=ModelConfig(context_length=128, lora=LoraConfig(rank=8, alpha=16.0)),
    data=DataConfig(batch_size=8, microbatch_size=2),  # Problems.
    objective=ObjectiveConfig(
        name="grpo",
        grpo=GrpoConfig(
            environment="reasoning-gym:chain_sum",
            options=("min_terms=2", "max_terms=2", "min_digits=1", "max_digits=2"),
            group_size=8,
            max_prompt_tokens=96,
            max_new_tokens=16,
            eval_problems=200,
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5, weight_decay=0.0),
    train=TrainConfig(steps=80, eval_every=20, log_every=1),
)
