"""What an answer may be, such as a text of a grammar: decided token by token, beside the device."""

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Which tokens may come next in one sequence, whose tokens it is told as they are drawn.

    It belongs to that sequence alone, and knows of no other. An exception that it raises ends the sequence.
    """

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, uint32 (ceil(n / 32),): bit i % 32 of word i // 32 is set for token i of n.
        None set: the sequence cannot go on. Tokens beyond the end are not allowed."""

    def take(self, token: int) -> None:
        """Takes the next token of the sequence, one that was allowed; that which ends a text is one of them."""
