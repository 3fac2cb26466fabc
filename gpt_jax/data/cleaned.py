"""A corpus without the documents that cleaning removes, judged by worker processes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from gpt_jax.config import CleanConfig
from gpt_jax.data.clean import SEPARATOR, Cleaner, Report, Selection, normalized, verdicts
from gpt_jax.data.engines import Engine
from gpt_jax.data.formats import Block, cut_document
from gpt_jax.data.progress import progress_bar
from gpt_jax.data.sources import Documents

TASK_BYTES = 1 << 20  # Text that a worker judges at one time.


@dataclass(frozen=True)
class Cleaned:
    """The documents of a corpus that are kept, normalised."""

    corpus: Documents
    config: CleanConfig
    kept: bytes  # For each document of the corpus: 1 if it is kept, else 0.

    @property
    def n_bytes(self) -> int:
        """See Documents."""
        return self.corpus.n_bytes

    def blocks(self, progress: Callable[[int], object]) -> Iterator[Block]:
        """See Documents."""
        for keep, (text, position) in zip(self.kept, _documents(self.corpus, progress), strict=True):
            if keep:
                yield from cut_document(normalized(text.decode(), self.config).encode(), position)


def clean_corpus(corpus: Documents, config: CleanConfig, engine: Engine) -> tuple[Cleaned, Report]:
    """Reads and judges all documents, which does not depend on the number of workers.

    Each document is held in memory as a whole. Raises UserError for a language that is not known, and for a package
    that is not installed.
    """
    Cleaner(config)  # Raises here, not in a worker.
    selection, kept = Selection(config), bytearray()

    def tasks() -> Iterator[tuple[int, bytes]]:
        waiting, size = list[bytes](), 0
        for text, _ in _documents(corpus, bar.update):
            waiting.append(text)
            size += len(text)
            if size >= TASK_BYTES:
                yield len(waiting), SEPARATOR.join(waiting)
                waiting, size = [], 0
        if waiting:
            yield len(waiting), SEPARATOR.join(waiting)

    with (
        progress_bar("cleaning", corpus.n_bytes) as bar,
        engine("clean", json.dumps(asdict(config))) as pool,
    ):
        for _, content in pool.encode(tasks()):
            for verdict in verdicts(content):
                kept.append(selection.keep(f"document {len(kept) + 1}", verdict))
    return Cleaned(corpus, config, bytes(kept)), selection.report


def _documents(corpus: Documents, progress: Callable[[int], object]) -> Iterator[tuple[bytes, int]]:
    """The text of each document, and the bytes of its source read so far."""
    text = bytearray()
    for block in corpus.blocks(progress):
        text += block.text
        if block.ends_document:
            yield bytes(text), block.position
            text.clear()
