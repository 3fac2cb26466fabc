"""The batch that a loader hands to a step, in training and in evaluation alike."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of sequences and their meaning: a pytree of NumPy or JAX arrays, whose None fields are no leaves.

    The shapes are those of B rows; with microbatches, each array has a leading axis A, (A, B, ...). With pairs, and
    with several answers to a problem, there is an axis K of them after B. Row b reads the tokens 0 to T - 1 and
    predicts the tokens 1 to T: target t is token t + 1.
    """

    tokens: Any  # int32 (B, T + 1): the ids.
    mask: Any = None  # bool or float32 (B, T): the weight of each target; None: every weight is 1.
    # int32 (B, T): the document of each input, of those that are packed into its row. Inputs see only their own
    # document. None: each row is one document.
    segments: Any = None
    positions: Any = None  # int32 (B, T): the position of each input in its document; None: each row counts from 0.
    extra: Any = None  # What an objective needs besides, a tuple of arrays (B, ...) of its own.
