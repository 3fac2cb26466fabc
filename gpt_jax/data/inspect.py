"""What a data folder holds: what was left out of it, how long its documents are, its most frequent tokens."""

from typing import Any, NamedTuple

import numpy as np

from gpt_jax.data.progress import progress_bar
from gpt_jax.data.rows import Tokens
from gpt_jax.data.shards import Dataset, Meta, SplitName
from gpt_jax.data.tuning import NOUNS
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.tokenizer import Tokenizer

CHUNK_TOKENS = 1 << 20
"""Tokens that are counted at one time: at 4 MB, they stay in the cache of a core."""
PERCENTS = (0, 10, 50, 90, 99, 100)


class Bin(NamedTuple):
    """Documents of similar length."""

    shortest: int  # Tokens of a document, a power of two.
    longest: int
    documents: int
    tokens: int  # Of all of them together.


class TokenCounts(NamedTuple):
    """How often each token occurs."""

    all: np.ndarray  # int64 (vocab_size,).
    learnt: np.ndarray | None  # int64 (vocab_size,): of the tokens to be learnt; None: there is no mask.


def document_lengths(tokens: Tokens) -> np.ndarray:
    """The number of tokens of each document, int64 (documents,)."""
    return np.diff(tokens.document_starts.astype(np.int64), append=len(tokens))


def histogram(lengths: np.ndarray) -> list[Bin]:
    """The documents by length (documents,), in bins that each reach to twice the length of the one before. There are
    all bins from that of the shortest to that of the longest document."""
    bins = np.frexp(lengths)[1] - 1  # The logarithm to base 2, rounded down, exactly.
    documents, sums = np.bincount(bins), np.bincount(bins, lengths)
    first = int(bins.min()) if len(bins) else 0
    return [Bin(1 << i, (2 << i) - 1, int(documents[i]), int(sums[i])) for i in range(first, len(documents))]


def percentiles(lengths: np.ndarray) -> dict[int, int]:
    """The lengths (documents,), of which there is at least one, that so many percent of documents do not exceed; each
    is the length of a document."""
    found = np.percentile(lengths, PERCENTS, method="inverted_cdf")
    return dict(zip(PERCENTS, found.tolist(), strict=True))


def count_tokens(tokens: Tokens, vocab_size: int) -> TokenCounts:
    """Reads a split once, behind a progress bar, and counts its tokens. Raises UserError for ids that the vocabulary
    does not have."""
    counts = np.zeros(vocab_size, np.int64)
    learnt = np.zeros(vocab_size, np.int64) if tokens.masked else None
    with progress_bar("counting", len(tokens), unit=" tokens") as bar:
        for start in range(0, len(tokens), CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, len(tokens) - start)
            ids = tokens.read(start, n)
            if (largest := int(ids.max())) >= vocab_size:
                raise UserError(f"the token id {largest} is not among the {vocab_size}; prepare the data again")
            counts += np.bincount(ids, minlength=vocab_size)
            if learnt is not None:
                learnt += np.bincount(ids[tokens.read_learnt(start, n)], minlength=vocab_size)
            bar.update(n)
    return TokenCounts(counts, learnt)


def most_frequent(counts: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The n most frequent tokens that occur at all, of counts (vocab_size,): their ids and counts."""
    order = np.argsort(-counts, kind="stable")[:n]
    return [(i, count) for i, count in zip(order.tolist(), counts[order].tolist(), strict=True) if count]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as Python writes a string; special tokens by their names alone."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    if token in names:
        return names[token]
    decoder = tokenizer.decoder(tokenizer.encode("a"))  # At the start of a text, some leave out the space of a token.
    return repr(decoder.push(token) + decoder.flush())


def facts(data: Dataset) -> dict[str, str]:
    """A data folder as a table of names and texts: what it is made of, both splits, and what was left out of it."""
    meta, template = data.meta, data.tokenizer.chat_template
    lines = len((template or "").splitlines())
    source = [str(name) for name in meta.settings["source"]]
    return {
        "format": meta.format,
        "source": ", ".join(source[:3]) + f" and {len(source) - 3:,} more" * (len(source) > 3),
        "tokenizer": f"{meta.tokenizer_file}, {meta.vocab_size:,} tokens, "
        + (f"a chat template of {lines} line{'s' * (lines != 1)}" if template is not None else "no chat template"),
        "training": _split_facts(meta, "train"),
        "validation": _split_facts(meta, "val"),
        **left_out(meta),
    }


def _split_facts(meta: Meta, name: SplitName) -> str:
    split = meta.splits[name]
    learnt = split.tokens if split.learnt is None else split.learnt
    kind = "documents" if meta.format == "text" else "examples"
    text = f"{split.documents:,} {kind}, {split.tokens:,} tokens"
    if counts := meta.report.get(name):
        answers = f" with {counts['answers']:,} answers" if "answers" in counts else ""
        text = f"{counts[NOUNS[meta.format]]:,} {NOUNS[meta.format]}{answers}, {text}"
    if split.learnt is not None:
        text += f", {learnt:,} ({learnt / split.tokens:.1%}) to be learnt"
    return f"{text}, {split.bytes / learnt:.2f} bytes a token" if learnt else text


def left_out(meta: Meta) -> dict[str, str]:
    """What was left out of a data folder, as a table of reasons and counts."""
    reasons = meta.report.get("left out", {})
    found = {f"left out: {reason}": f"{n:,} record{'s' * (n > 1)}" for reason, n in reasons.items()}
    clean: dict[str, Any] = meta.report.get("clean", {})
    for rule, removed in clean.get("removed", {}).items():
        found[f"removed: {rule}"] = f"{removed['documents']:,} of {clean['documents']:,} documents"
    return found or {"left out": "nothing that prepare counts"}
