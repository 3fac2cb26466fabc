"""The split into training and validation text, which is the same whenever the same corpus is prepared."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from gpt_jax.data.formats import Block, cut_before_space
from gpt_jax.data.shards import SplitName


@dataclass(frozen=True)
class ByDocument:
    """A document is for validation when the hash of its first block falls into that fraction of all hashes.

    So copies of a document are in the same split, and a document stays in its split when others join the corpus.
    """

    fraction: float

    def after(self, n_bytes: int) -> Self:
        """The split of what comes after the first `n_bytes` of the text, which end a document."""
        return self

    def __call__(self, blocks: Iterable[Block]) -> Iterator[tuple[SplitName, Block]]:
        """Each block with the split it belongs to."""
        split: SplitName | None = None
        for block in blocks:
            if split is None:
                digest = hashlib.blake2b(block.text, digest_size=8).digest()
                split = "val" if int.from_bytes(digest, "little") < self.fraction * 2**64 else "train"
            yield split, block
            if block.ends_document:
                split = None


@dataclass(frozen=True)
class ByPosition:
    """The first `train_bytes` of the text are for training. A document across the border is cut in two, at a space."""

    train_bytes: int

    def after(self, n_bytes: int) -> Self:
        """See ByDocument."""
        return replace(self, train_bytes=self.train_bytes - n_bytes)

    def __call__(self, blocks: Iterable[Block]) -> Iterator[tuple[SplitName, Block]]:
        """Each block with the split it belongs to."""
        left = self.train_bytes
        within_document = False  # Of the text for training.
        for block in blocks:
            if left <= 0:
                yield "val", block
                continue
            cut = cut_before_space(block.text, left)
            left -= len(block.text)
            if cut > 0 or within_document:
                within_document = left > 0 and not block.ends_document
                yield "train", block._replace(text=block.text[:cut], ends_document=not within_document)
            if cut < len(block.text):
                yield "val", block._replace(text=block.text[cut:])


def choose_split(fraction: float, total_bytes: int, val_bytes: int) -> ByDocument | ByPosition:
    """The split by document, unless its validation text, of `val_bytes`, is far from `fraction`; then by position.

    Far means off by more than half of the smaller side. That happens with one document, with few, or with one that is
    much longer than the others; then the end of the text is for validation.
    """
    if abs(val_bytes / total_bytes - fraction) <= min(fraction, 1 - fraction) / 2:
        return ByDocument(fraction)
    return ByPosition(round((1 - fraction) * total_bytes))
