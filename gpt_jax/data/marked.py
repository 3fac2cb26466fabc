"""Tokens as text for people, with what is to be learnt, and special tokens, marked."""

import html
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.data.conversations import CONTEXT
from gpt_jax.tokenizer.tokenizer import Tokenizer

ALONE = "\n\t\u200c\u200d"  # Characters that are shown as they are, besides the printable: joiners make emoji.


class Run(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    learnt: bool = False
    special: bool = False  # Special tokens, by their names.


def runs(tokenizer: Tokenizer, ids: np.ndarray, learnt: np.ndarray | None = None) -> list[Run]:
    """The runs of token ids (n,). learnt: which of them are to be marked, bool (n,); None: none.

    A character that is cut by the beginning or the end, or that is learnt in part, becomes U+FFFD.
    """
    tokens, special = ids.tolist(), set(tokenizer.special_tokens.values())
    marks = [False] * len(tokens) if learnt is None else learnt.tolist()
    kinds = [(mark, token in special) for mark, token in zip(marks, tokens, strict=True)]
    found, start = [], 0
    for kind, group in itertools.groupby(kinds):
        end = start + len([*group])
        decoder = tokenizer.decoder(tokens[max(0, start - CONTEXT) : start])
        text = "".join(map(decoder.push, tokens[start:end])) + decoder.flush()
        found.append(Run(text, *kind))
        start = end
    return found


def shortened(found: Sequence[Run], most: int) -> list[Run]:
    """The runs, with the middle left out if they are longer than `most` characters, and said so."""
    n = sum(len(run.text) for run in found)
    if n <= most:
        return list(found)
    head, tail = most - most // 2, most // 2
    note = Run(f" [... {n - most:,} characters left out ...] ")
    return [*_part(found, 0, head), note, *_part(found, n - tail, n)]


def _part(found: Sequence[Run], start: int, end: int) -> Iterator[Run]:
    """The characters start to end - 1 of some runs."""
    for run in found:
        if text := run.text[max(0, start) : max(0, end)]:
            yield run._replace(text=text)
        start, end = start - len(run.text), end - len(run.text)


def escaped(text: str) -> str:
    """Text in which nothing acts on a terminal or a page: control characters, and those that turn the direction of
    writing, are spelled as in Python. Spaces of all kinds, letters and signs are as they are."""
    if text.isprintable():
        return text
    kept = (c.isprintable() or c in ALONE or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if k else c.encode("unicode_escape").decode() for c, k in zip(text, kept, strict=True))


def as_text(found: Sequence[Run], color: bool) -> str:
    """The runs for a terminal: green is learnt, bold are special tokens. Without colour, what is learnt is between
    brackets, ⟦ and ⟧, and special tokens are shown by their names alone."""
    if not color:
        parts = ((learnt, "".join(escaped(run.text) for run in group)) for learnt, group in _by_learnt(found))
        return "".join(f"⟦{text}⟧" if learnt else text for learnt, text in parts)
    colored = []
    for run in found:
        codes = ";".join(["1"] * run.special + ["32"] * run.learnt)
        lines = escaped(run.text).split("\n")  # Each has its own codes, which pagers need.
        colored.append("\n".join(f"\x1b[{codes}m{line}\x1b[0m" if codes and line else line for line in lines))
    return "".join(colored)


def in_html(found: Sequence[Run]) -> str:
    """The runs as HTML: <mark> is learnt, <b> are special tokens."""

    def element(run: Run) -> str:
        text = html.escape(escaped(run.text))
        return f"<b>{text}</b>" if run.special else text

    parts = ((learnt, "".join(map(element, group))) for learnt, group in _by_learnt(found))
    return "".join(f"<mark>{text}</mark>" if learnt else text for learnt, text in parts)


def _by_learnt(found: Sequence[Run]) -> Iterator[tuple[bool, Iterator[Run]]]:
    return itertools.groupby(found, key=lambda run: run.learnt)
