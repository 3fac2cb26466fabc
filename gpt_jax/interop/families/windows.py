"""The sliding-window layers of a published model, from and to its config.json."""

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.families.family import Settings

LAYER_TYPES = {"sliding_attention": "s", "full_attention": "f"}


def shortest_period(pattern: str) -> str:
    """The shortest string whose repetition begins with `pattern`."""
    L = len(pattern)
    return next(pattern[:n] for n in range(1, L + 1) if (pattern[:n] * (L // n + 1))[:L] == pattern)


def from_layer_types(types: list[str], n_layer: int, window: int) -> Settings:
    """Our window and window_pattern. Raises UserError unless there is a type for each layer, and a window for sliding
    ones."""
    if len(types) != n_layer:
        raise UserError(f"layer_types has {len(types)} types, and there are {n_layer} layers")
    if "sliding_attention" in types and not window:
        raise UserError("layer_types has sliding layers, but no sliding_window is set or used")
    pattern = shortest_period("".join(LAYER_TYPES[t] for t in types))
    return {} if pattern == "f" else {"window": window, "window_pattern": pattern}


def to_layer_types(config: ModelConfig) -> list[str]:
    """The type of each layer's attention, as config.json names it."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding]
