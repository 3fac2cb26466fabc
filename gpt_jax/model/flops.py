"""The number of floating-point operations that training takes, by formula."""

from gpt_jax.config import ModelConfig

FLOPS_FORMULA = "6 N (with adapters 4 N) + 12 H K FLOPs a key seen, a token (N: parameters in products; T / 2 keys)"


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of a training step per token, forward and backward, without recomputation.

    The matrix products take 6 N (Kaplan et al. 2020). N counts all parameters except embeddings that are only looked
    up. Attention takes 12 H K per key that a token sees on average in each layer (PaLM, appendix B): T / 2 keys, since
    it is causal, and fewer with a sliding window. With adapters the products take 4 N, since the gradients of frozen
    matrices are not computed.
    """
    c = config
    looked_up = c.n_positions + (0 if c.tied_head else c.embedding_rows)
    products = (4 if c.lora.rank else 6) * (c.n_params - looked_up * c.d_model)
    return products + 12 * c.n_head * c.head_dim * keys_seen(c)


def keys_seen(config: ModelConfig) -> float:
    """The number of keys that a token sees on average, summed over all layers."""
    T, window = config.context_length, min(config.window, config.context_length)
    return sum(window * (1 - window / (2 * T)) if sliding else T / 2 for sliding in config.sliding)
