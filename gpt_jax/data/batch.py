"""What goes from the loader to a step, in training and in evaluation alike."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A batch of sequences and what they mean: arrays of NumPy or JAX, and a pytree, whose None are no leaves.

    The shapes are those of B rows; with microbatches, each has an axis A before them, (A, B, ...). Row b reads the
    tokens 0 to T - 1 and predicts the tokens 1 to T: target t is token t + 1.
    """

    tokens: Any  # int32 (B, T + 1): the ids.
    mask: Any = None  # bool or float32 (B, T): how much each target counts; None: every target counts as one.
    # int32 (B, T): which of the documents that are packed into its row each input is of. Inputs see those of their own
    # document alone. None: each row is one document.
    segments: Any = None
    positions: Any = None  # int32 (B, T): the position of each input in its document; None: from 0 on in each row.
