"""The loss of a model on a split of a data folder, or on text, with every token scored exactly once."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from gpt_jax.data.formats import Block
from gpt_jax.data.shards import TokenFiles
from gpt_jax.errors import UserError
from gpt_jax.evaluate.score import Scorer
from gpt_jax.evaluate.windows import Window, masked_windows, windows
from gpt_jax.tokenizer.tokenizer import Tokenizer, after_cut, encode_on

PIECE_TOKENS = 1 << 20  # Tokens of a data folder that are read at the same time.
PIECE_BYTES = 4 << 20  # Documents up to this size are tokenised as a whole, longer ones where possible in pieces.


@dataclass
class Tally:
    """The counts and the score of a text."""

    documents: int = 0
    bytes: int = 0  # Of the text, in UTF-8.
    characters: int | None = None  # Of the text; None when only its tokens are known.
    nats: float = 0.0  # -log of the probability of all scored tokens.
    tokens: int = 0  # Tokens that were scored.
    unscored: int = 0  # Tokens that had nothing before them to be predicted from.

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700))  # The exponential of more overflows.

    @property
    def bits(self) -> float:
        """Bits of the whole text. A token that was not scored counts as much as the others on average, as in the
        evaluations of training."""
        return self.loss * (self.tokens + self.unscored) / math.log(2)


def evaluate_split(scorer: Scorer, split: TokenFiles, context_length: int, stride: int) -> Tally:
    """The loss over a split of a data folder, read as one stream of tokens, ends of documents included. Its first
    token, which nothing predicts, is not scored. With a mask, each document is read on its own, and what is to be
    learnt is scored.

    With stride = context_length, this is the val_loss of training, but for documents with a mask that are longer:
    training cuts them. Raises UserError when the split has fewer than two tokens, and as `add_up` does.
    """
    n = len(split)
    if split.masked:
        tally = Tally(documents=len(split.document_starts), bytes=split.n_bytes)
        add_up(scorer, document_windows(split, context_length, stride), tally, split.n_learnt)
        return tally
    if n < 2:
        raise UserError(f"the split has {n} tokens, and two are needed; prepare the data with more text")
    pieces = (split.read(start, min(PIECE_TOKENS, n - start)) for start in range(0, n, PIECE_TOKENS))
    tally = Tally(documents=len(split.document_starts), bytes=split.n_bytes, unscored=1)
    add_up(scorer, windows(pieces, context_length, stride), tally, n - 1)
    return tally


def document_windows(split: TokenFiles, context_length: int, stride: int) -> Iterator[Window]:
    """The windows over all documents of a split with a mask."""
    starts = split.document_starts.tolist()
    for start, end in pairwise([*starts, len(split)]):
        tokens, learnt = split.read(start, end - start), split.read_learnt(start, end - start)
        yield from masked_windows(tokens, learnt, context_length, stride)


def evaluate_blocks(
    scorer: Scorer, blocks: Iterable[Block], tokenizer: Tokenizer, context_length: int, stride: int
) -> Tally:
    """The loss over documents in blocks of text, each on its own. Every token of their text is scored; the first one is
    predicted from the token that starts a text.

    Raises UserError when there is no text, naming a file that cannot be read, and as `add_up` does.
    """
    tally = Tally(characters=0)
    documents = tokenised(blocks, tokenizer, tally)
    to_score = (window for document in documents for window in windows(document, context_length, stride))
    add_up(scorer, to_score, tally, None)
    return tally


def tokenised(blocks: Iterable[Block], tokenizer: Tokenizer, tally: Tally) -> Iterator[Iterator[np.ndarray]]:
    """For each document, its tokens in pieces, int32, after the token that starts a text. Counts them in `tally`.

    Each document must be read to its end before the next one.
    """
    start = tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text
    parts = text_parts(blocks, tokenizer)

    def document(part: str, ends: bool) -> Iterator[np.ndarray]:
        yield np.array([start], np.int32)
        ids = tokenizer.encode_array(part)
        while True:
            tally.bytes += len(part.encode())
            tally.characters = (tally.characters or 0) + len(part)
            yield ids
            if ends:
                return
            part, ends = next(parts)
            ids = encode_on(tokenizer, part)

    for part, ends in parts:
        tally.documents += 1
        yield document(part, ends)


def text_parts(blocks: Iterable[Block], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of documents in parts of PIECE_BYTES or more, cut where the tokenizer allows, each with True if it ends
    its document."""
    text = bytearray()
    for block in blocks:
        text += block.text
        if block.ends_document:
            yield text.decode(), True
            text.clear()
        elif len(text) >= PIECE_BYTES:
            uncut = after_cut(tokenizer, block.text)
            if len(uncut) < len(block.text):
                yield text[: len(text) - len(uncut)].decode(), False
                text[:] = uncut


def add_up(scorer: Scorer, to_score: Iterator[Window], tally: Tally, n_tokens: int | None) -> None:
    """Adds the scores of windows to the tally, with a progress bar on a terminal. n_tokens: the number of tokens to
    score, if it is known.

    Raises UserError when there are none, or when a score is not finite.
    """
    with tqdm(total=n_tokens, desc="evaluating", unit=" tokens", unit_scale=True, disable=None) as bar:

        def counted() -> Iterator[Window]:
            for window in to_score:
                tally.tokens += window.n_scored
                bar.update(window.n_scored)
                yield window

        for score in scorer(counted()):
            tally.nats += score.nats
    if not tally.tokens:
        raise UserError("there is no text to evaluate: every document is empty")
