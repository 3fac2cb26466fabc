"""The floating-point operations that training takes, by formula."""

from gpt_jax.config import ModelConfig

FLOPS_FORMULA = "6 N (with adapters 4 N) + 12 H K FLOPs a key seen, a token (N: parameters in products; T / 2 keys)"


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of a training step per token, forward and backward, recomputation not counted.

    6 N for the matrix products (Kaplan et al. 2020), with N the parameters but for embeddings that are only looked up;
    and 12 H K times the keys that a token sees on the average in each layer: PaLM's appendix B, with T / 2 keys, since
    attention is causal, and fewer in layers with a sliding window. With adapters, 4 N: the gradients of the frozen
    matrices are not computed.
    """
    c = config
    looked_up = c.n_positions + (0 if c.tied_head else c.embedding_rows)
    products = (4 if c.lora.rank else 6) * (c.n_params - looked_up * c.d_model)
    return products + 12 * c.n_head * c.head_dim * keys_seen(c)


def keys_seen(config: ModelConfig) -> float:
    """Keys that a token sees on the average, in all layers together."""
    T, window = config.context_length, min(config.window, config.context_length)
    return sum(window * (1 - window / (2 * T)) if sliding else T / 2 for sliding in config.sliding)
