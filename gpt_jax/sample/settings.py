"""Settings of generation. JAX is not imported, since the fields of these classes are flags of `sample`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from gpt_jax.config import check
from gpt_jax.errors import UserError

MOST_BIASES = 300
"""Tokens whose logits a text may change, as in OpenAI's API."""

MOST_STOPS = 64
"""Strings that may end a text."""

MOST_STOP_IDS = 64
"""Tokens that may end a text."""

MOST_ALTERNATIVES = 20
"""Alternatives of a token whose log-probabilities may be asked for, as in OpenAI's API."""


@dataclass(frozen=True)
class Filters:
    """How the next token is chosen."""

    temperature: float = 0.8  # Divides the logits; 0: always the most probable token.
    top_k: int = 0  # Draw from the k most probable tokens only; 0: from all.
    top_p: float = 0.95  # Draw from the fewest tokens whose probabilities add up to p.
    min_p: float = 0.0  # Draw from tokens at least this many times as probable as the most probable one.
    repetition_penalty: float = 1.0  # Makes tokens that were seen before less probable; 1: no penalty.
    presence_penalty: float = 0.0  # Subtracted from the logits of tokens that the answer has.
    frequency_penalty: float = 0.0  # Subtracted as many times as the answer has the token.
    logit_bias: tuple[tuple[int, float], ...] = ()  # Tokens, by id, each with a number to add to its logit.

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        # Penalties beyond these have no other effect, but can take logits out of float32.
        penalty = self.repetition_penalty
        check(1e-6 <= penalty <= 1e6, "repetition_penalty", penalty, "between 1e-06 and 1e+06 (1: no penalty)")
        for name in ("presence_penalty", "frequency_penalty"):
            check(-100 <= getattr(self, name) <= 100, name, getattr(self, name), "between -100 and 100 (0: no penalty)")
        biases = f"at most {MOST_BIASES} pairs of a token's id and a number between -100 and 100"
        check(is_bias(self.logit_bias), "logit_bias", self.logit_bias, biases)


def is_bias(value: Any) -> bool:
    """True for pairs of an id, each of which occurs once, and a number."""
    if not isinstance(value, tuple | list) or len(value) > MOST_BIASES:
        return False
    pairs = all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and are_ids(pair[:1])
        and isinstance(pair[1], Real)
        and -100 <= float(pair[1]) <= 100
        for pair in value
    )
    return pairs and len({token for token, _ in value}) == len(value)


def are_ids(values: Any) -> bool:
    """True for a list of numbers that may be tokens' ids, which are int32."""
    return isinstance(values, tuple | list) and all(isinstance(i, Integral) and 0 <= int(i) < 2**31 for i in values)


@dataclass(frozen=True)
class Settings:
    """The settings of the text to generate from each prompt."""

    max_new_tokens: int = 200  # Tokens to generate at most.
    seed: int = 0  # The same seed gives the same text.
    stop: tuple[str, ...] = ()  # Strings that end the text, and are not part of it.
    stop_ids: tuple[int, ...] = ()  # Tokens, by id, that end the text, besides those of the tokenizer.
    alternatives: int = 0  # Most probable tokens whose log-probabilities are kept, for each token.
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        check(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and less than 2**31")
        strings = isinstance(self.stop, tuple | list) and all(isinstance(s, str) and s for s in self.stop)
        check(strings, "stop", self.stop, "a list of strings, each of one character or more")
        check(len(self.stop) <= MOST_STOPS, "stop", f"{len(self.stop)} strings", f"at most {MOST_STOPS}")
        ids = f"at most {MOST_STOP_IDS} ids of tokens, each from 0 to 2**31 - 1"
        check(are_ids(self.stop_ids) and len(self.stop_ids) <= MOST_STOP_IDS, "stop_ids", self.stop_ids, ids)
        few = f"between 0 and {MOST_ALTERNATIVES}"
        check(0 <= self.alternatives <= MOST_ALTERNATIVES, "alternatives", self.alternatives, few)


def changed(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings of which some fields, or of their filters, are others. Raises UserError naming an unknown field."""
    filters = {name: value for name, value in given.items() if name in Filters.__dataclass_fields__}
    others = {name: value for name, value in given.items() if name not in filters}
    known = Settings.__dataclass_fields__.keys() - {"filters"}
    for name in others.keys() - known:
        raise UserError(f"there is no setting {name}; there are {', '.join(sorted({*known, *vars(Filters())}))}")
    return dataclasses.replace(settings, **others, filters=dataclasses.replace(settings.filters, **filters))


def check_numbers(settings: Any) -> None:
    """Raises UserError unless the fields of type int and float are numbers, Python's or NumPy's."""
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if each.type is int:
            check(isinstance(value, Integral), each.name, value, "a whole number")
        elif each.type is float:
            check(isinstance(value, Real), each.name, value, "a number")
