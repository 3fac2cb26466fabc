"""Settings of generation. JAX is not imported, since the fields of these classes are flags of `sample`."""

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from gpt_jax.config import check


@dataclass(frozen=True)
class Filters:
    """How the next token is chosen. The values are part of the compiled program: others compile another one."""

    temperature: float = 0.8  # Divides the logits; 0: always the most probable token.
    top_k: int = 0  # Draw from the k most probable tokens only; 0: from all.
    top_p: float = 0.95  # Draw from the fewest tokens whose probabilities add up to p.
    min_p: float = 0.0  # Draw from tokens at least this many times as probable as the most probable one.
    repetition_penalty: float = 1.0  # Makes tokens that were seen before less probable; 1: no penalty.

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        # Penalties beyond these have no other effect, but can take logits out of float32.
        penalty = self.repetition_penalty
        check(1e-6 <= penalty <= 1e6, "repetition_penalty", penalty, "between 1e-06 and 1e+06 (1: no penalty)")


@dataclass(frozen=True)
class Settings:
    """The settings of the text to generate from each prompt."""

    max_new_tokens: int = 200  # Tokens to generate at most.
    seed: int = 0  # The same seed gives the same text.
    stop: tuple[str, ...] = ()  # Strings that end the text, and are not part of it.
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        check(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and less than 2**31")
        strings = isinstance(self.stop, tuple | list) and all(isinstance(s, str) and s for s in self.stop)
        check(strings, "stop", self.stop, "a list of strings, each of one character or more")


def check_numbers(settings: Any) -> None:
    """Raises UserError unless the fields of type int and float are numbers, Python's or NumPy's."""
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if each.type is int:
            check(isinstance(value, Integral), each.name, value, "a whole number")
        elif each.type is float:
            check(isinstance(value, Real), each.name, value, "a number")
