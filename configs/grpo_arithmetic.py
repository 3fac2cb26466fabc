"""Rewards: the small model of arithmetic.py learns which of its answers are right. Minutes on two cores.

python train.py configs/arithmetic.py
python train.py configs/grpo_arithmetic.py
"""

from gpt_jax.config import Config, DataConfig, GrpoConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="runs/arithmetic",
    model=ModelConfig(context_length=32),
    data=DataConfig(batch_size=32),  # Problems.
    objective=ObjectiveConfig(
        name="grpo",
        grpo=GrpoConfig(
            environment="arithmetic",
            options=("digits=1", "terms=3"),
            group_size=8,
            max_prompt_tokens=6,
            max_new_tokens=4,
            slots=256,
            eval_problems=400,
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=30, weight_decay=0.0, beta2=0.99),
    train=TrainConfig(steps=2000, eval_every=100),
)
