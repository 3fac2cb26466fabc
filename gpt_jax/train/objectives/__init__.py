"""The objectives that training minimises, one file and one formula each.

An objective is a pure function `(model, params, batch, keys_B) -> Sums` of one microbatch on one device (on a mesh: of
one microbatch). It returns sums and never means: the step sums them over microbatches and devices and then divides, so
that the result does not depend on how the batch was cut. The gradient is that of the numerator.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT, Params


class Sums(NamedTuple):
    """Float32 scalars to sum up, then divide: the loss is numerator / denominator.

    The denominator does not depend on the parameters. `logged` has the numerator and denominator of each further value
    to report, by its name in metrics.jsonl. `largest` has values of at least 0 of which the largest one is reported.
    """

    numerator: jax.Array
    denominator: jax.Array
    logged: dict[str, tuple[jax.Array, jax.Array]]
    largest: dict[str, jax.Array]

    def plus(self, other: "Sums") -> "Sums":
        """The sums of both."""
        added = jax.tree.map(jnp.add, self, other)
        return added._replace(largest=jax.tree.map(jnp.maximum, self.largest, other.largest))

    def over(self, axis_name: str | None) -> "Sums":
        """The sums over the devices of a mapped axis; themselves where there is none."""
        if axis_name is None:
            return self
        return jax.lax.psum(self, axis_name)._replace(largest=jax.lax.pmax(self.largest, axis_name))

    def values(self) -> dict[str, jax.Array]:
        """What is logged."""
        return {name: total / or_one(count) for name, (total, count) in self.logged.items()} | self.largest


def or_one(count: jax.Array) -> jax.Array:
    """`count`, or 1 where it is 0: a divisor for sums that are 0 in that case."""
    return jnp.where(count == 0, 1, count)


Objective = Callable[[GPT, Params, Batch, jax.Array | None], Sums]
"""`(model, params, batch, keys_B)`: the batch has no axis of microbatches; keys_B has one dropout key per row, or is
None for no dropout."""
