"""The four sizes of GPT-2 (Radford et al. 2019, table 2)."""

from gpt_jax.config import ModelConfig

VOCAB_SIZE = 50304  # GPT-2's 50257 tokens, padded to a multiple of 128, which suits matrix units.

GPT2 = ModelConfig(vocab_size=VOCAB_SIZE, n_layer=12, n_head=12, d_model=768)
GPT2_MEDIUM = ModelConfig(vocab_size=VOCAB_SIZE, n_layer=24, n_head=16, d_model=1024, unroll=False)
GPT2_LARGE = ModelConfig(
    vocab_size=VOCAB_SIZE, n_layer=36, n_head=20, d_model=1280, unroll=False, remat="dots_no_batch"
)
GPT2_XL = ModelConfig(vocab_size=VOCAB_SIZE, n_layer=48, n_head=25, d_model=1600, unroll=False, remat="full")
