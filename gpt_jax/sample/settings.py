"""Settings of generation. JAX is not imported, since the fields of these classes are flags of `sample`."""

from dataclasses import dataclass, field

from gpt_jax.config import check


@dataclass(frozen=True)
class Filters:
    """How the next token is chosen. The values are part of the compiled program: others compile another one."""

    temperature: float = 0.8  # Divides the logits; 0: always the most probable token.
    top_k: int = 0  # Draw from the k most probable tokens only; 0: from all.
    top_p: float = 1.0  # Draw from the fewest tokens whose probabilities add up to p.
    min_p: float = 0.0  # Draw from tokens at least this many times as probable as the most probable one.
    repetition_penalty: float = 1.0  # Makes tokens that were seen before less probable; 1: no penalty.

    def __post_init__(self) -> None:
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")


@dataclass(frozen=True)
class Settings:
    """The settings of the text to generate from each prompt."""

    max_new_tokens: int = 200  # Tokens to generate at most.
    seed: int = 0  # The same seed gives the same text.
    stop: tuple[str, ...] = ()  # Strings that end the text, and are not part of it.
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        check(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and less than 2**31")
        check(all(self.stop), "stop", self.stop, "strings of one character or more")
