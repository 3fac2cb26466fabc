"""Which layers of a published model slide, from and to its config.json."""

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families.family import Settings

LAYER_TYPES = {"sliding_attention": "s", "full_attention": "f"}


def shortest_period(pattern: str) -> str:
    """The shortest string that `pattern` is the beginning of a repetition of."""
    return next(
        pattern[:n] for n in range(1, len(pattern) + 1) if (pattern[:n] * len(pattern))[: len(pattern)] == pattern
    )


def from_layer_types(types: list[str], window: int) -> Settings:
    """Our window and window_pattern."""
    pattern = shortest_period("".join(LAYER_TYPES[t] for t in types))
    return {} if pattern == "f" else {"window": window, "window_pattern": pattern}


def to_layer_types(config: ModelConfig) -> list[str]:
    """The name of each layer's attention."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding]
