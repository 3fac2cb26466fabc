"""The sliding-window layers of a published model, from and to its config.json."""

from gpt_jax.config import ModelConfig
from gpt_jax.interop.families.family import Settings

LAYER_TYPES = {"sliding_attention": "s", "full_attention": "f"}


def shortest_period(pattern: str) -> str:
    """The shortest string whose repetition begins with `pattern`."""
    return next(
        pattern[:n] for n in range(1, len(pattern) + 1) if (pattern[:n] * len(pattern))[: len(pattern)] == pattern
    )


def from_layer_types(types: list[str], window: int) -> Settings:
    """Our window and window_pattern."""
    pattern = shortest_period("".join(LAYER_TYPES[t] for t in types))
    return {} if pattern == "f" else {"window": window, "window_pattern": pattern}


def to_layer_types(config: ModelConfig) -> list[str]:
    """The type of each layer's attention, as config.json names it."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding]
