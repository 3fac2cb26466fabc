"""The objectives that training minimises, one file and one formula each.

An objective is a pure function `(model, params, batch, keys_B) -> Sums` of one microbatch on one device (on a mesh: of
one microbatch). It returns sums and never means: the step sums them over microbatches and devices and then divides, so
that the result does not depend on how the batch was cut. The gradient is that of the numerator.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gpt_jax.data.batch import Batch
from gpt_jax.model.gpt import GPT, Params


class Sums(NamedTuple):
    """Float32 scalars to sum up, then divide: the loss is numerator / denominator.

    The denominator does not depend on the parameters. `logged` has the numerator and denominator of each further value
    to report, by its name in metrics.jsonl.
    """

    numerator: jax.Array
    denominator: jax.Array
    logged: dict[str, tuple[jax.Array, jax.Array]]


Objective = Callable[[GPT, Params, Batch, jax.Array | None], Sums]
"""`(model, params, batch, keys_B)`: the batch has no axis of microbatches; keys_B has one dropout key per row, or is
None for no dropout."""
