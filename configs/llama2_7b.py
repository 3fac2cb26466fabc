"""Llama 2's architecture at 7 billion parameters, from random weights, on four million tokens a step, over a mesh.

Sixteen TPU v5p chips: python train.py configs/llama2_7b.py --coordinator auto
"""

from gpt_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=32_000,
        context_length=4096,
        n_layer=32,
        n_head=32,
        d_model=4096,
        d_ff=11_008,
        positions="rotary",
        norm="rms",
        activation="silu",
        gated=True,
        bias=False,
        tied_head=False,
        unroll=False,
        remat="full",
    ),
    data=DataConfig(dir="data/web", batch_size=1024, microbatch_size=2),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    train=TrainConfig(steps=250_000, eval_every=1000),
    parallel=ParallelConfig(fsdp=8, tensor=2),
)
