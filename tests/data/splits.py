"""Splits in memory, for tests of what reads them."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from gpt_jax.data.loader import MixedBatches, Source
from gpt_jax.data.mixture import Stage
from gpt_jax.data.rows import Stream, Tokens


class Split:
    """Documents one after the other. The ids are 1, 2, 3, ..., so a token tells its place, and none is padding.

    documents: the lengths of texts, or for each token of conversations, whether it is to be learnt.
    """

    is_remote = False

    def __init__(self, documents: Sequence[int] | Sequence[Sequence[bool]]) -> None:
        lengths = [document if isinstance(document, int) else len(document) for document in documents]
        self.ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
        self.document_starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
        self.masked = not all(isinstance(document, int) for document in documents)
        masks = [document for document in documents if not isinstance(document, int)]
        self.mask = np.concatenate([np.array(mask, bool) for mask in masks]) if masks else np.ones(len(self.ids), bool)
        self.n_learnt = int(self.mask.sum()) if self.masked else None
        self.reads: list[tuple[int, int]] = []  # Of the mask: starts and counts.

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= len(self.ids)
        return self.ids[start : start + count]

    def read_learnt(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= len(self.ids)
        self.reads.append((start, count))
        return self.mask[start : start + count]


def stream_batches(tokens: Tokens, context_length: int, batch_size: int, seed: int) -> MixedBatches:
    """The batches of a training run on one stream."""
    return MixedBatches([Source("text", Stream(tokens, context_length))], [Stage(0, (1.0,))], batch_size, seed)


@st.composite
def conversations(draw: st.DrawFn, max_size: int = 12) -> list[list[bool]]:
    """Which tokens of each conversation are to be learnt: turns that alternate, of any length, the first of either."""
    turns = st.tuples(st.booleans(), st.lists(st.integers(1, 12), min_size=1, max_size=6))
    drawn = draw(st.lists(turns, min_size=1, max_size=max_size))
    return [[(i + first) % 2 == 1 for i, n in enumerate(turns) for _ in range(n)] for first, turns in drawn]


texts = st.lists(st.integers(1, 60), min_size=1, max_size=30)
splits = st.builds(Split, texts | conversations())
