"""Rows into which documents of random lengths are packed."""

import numpy as np

from gpt_jax.data.batch import Batch


def random_documents(rng: np.random.Generator, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """The document of each of T tokens in B rows, and the token's position in it: int32 (B, T) each.

    Every row has three documents or more, and their ids are in no order.
    """
    begins = rng.random((B, T)) < 4 / T
    begins[:, [0, T // 3, T // 2]] = True
    starts = np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
    ids = rng.permutation(B * T).astype(np.int32).reshape(B, T)
    return np.take_along_axis(ids, starts, axis=1), (np.arange(T) - starts).astype(np.int32)


def random_batch(rng: np.random.Generator, B: int, T: int, vocab_size: int) -> Batch:
    """Documents of random tokens; all tokens of a document but its first are targets."""
    segments, positions = random_documents(rng, B, T + 1)
    tokens = rng.integers(0, vocab_size, (B, T + 1), dtype=np.int32)
    return Batch(tokens, positions[:, 1:] > 0, segments[:, :-1], positions[:, :-1])
