"""Gopher's rules for the text of web pages: its words and lines, and how much of it is repeated.

Source: Rae et al. 2021, Scaling Language Models: Methods, Analysis & Insights from Training Gopher (arXiv:2112.11446),
section A.1.1 and table A1, from which the limits are. It leaves open what a word, a duplicate and a share are; here:

A word is what stands between spaces, or a character of a script that is written without spaces (Chinese, Japanese,
Thai...). The rules of words and n-grams do not apply to text that is mostly in such scripts, since they removed 14 of
15 pages of help in Japanese, and 6 of 15 in Chinese. A duplicate is what occurred before in the text. Shares of n-grams
are of the characters of all words, each counted once; shares of lines and paragraphs leave out the space around them.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import NamedTuple

import numpy as np

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters; not Hangul, which has spaces.
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U000323af"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
IS_UNSPACED = re.compile(rf"[{UNSPACED}]")
BULLET = re.compile(r"[•‣⁃◦▪●○■□]|[-*–]\s")  # noqa: RUF001
ELLIPSES = ("...", "…")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

TOP_N_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
"""The largest share of the most frequent n-gram."""

DUPLICATE_N_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""The largest share of all duplicate n-grams."""


class Finding(NamedTuple):
    """Why a document is removed."""

    rule: str  # The same for all documents that break the rule, such as "duplicate lines above 0.30 of all".
    value: str  # What this document has, such as "0.4359".


def quality(text: str, words: list[str], min_stop_words: int) -> Finding | None:
    """The first of Gopher's rules of quality that a text breaks, but for the number of words; None if it breaks none.

    words: those of the text, by WORD. min_stop_words: how many of the STOP_WORDS it must have; Gopher asks
    for 2. They are English.
    """
    n, lines = max(1, len(words)), _stripped(text.splitlines())
    rules = [
        ("hash signs above {} a word", text.count("#") / n, 0.1),
        ("ellipses above {} a word", sum(map(text.count, ELLIPSES)) / n, 0.1),
        ("lines with a bullet above {} of all", _share(map(BULLET.match, lines)), 0.9),
        ("lines with an ellipsis above {} of all", _share(line.endswith(ELLIPSES) for line in lines), 0.3),
    ]
    has_words = not _is_unspaced(words)
    if has_words:
        without_letter = _share(not any(map(str.isalpha, word)) for word in words)
        rules.append(("words without a letter above {} of all", without_letter, 0.2))
    for rule, share, limit in rules:
        if share > limit:
            return Finding(rule.format(f"{limit:.2f}"), f"{share:.4f}")
    mean_length = sum(map(len, words)) / n
    if has_words and not 3 <= mean_length <= 10:
        return Finding("mean length of words not 3 to 10", f"{mean_length:.4f}")
    found = len(STOP_WORDS & set(map(str.lower, words)))
    if has_words and found < min_stop_words:
        return Finding(f"fewer than {min_stop_words} English stop words", str(found))
    return None


def repetition(text: str, words: list[str]) -> Finding | None:
    """The first of Gopher's rules of repetition that a text breaks; None if it breaks none. words: those of the text,
    by WORD."""
    for rule, share, limit in _repetitions(text, words):
        if share > limit:
            return Finding(rule.format(f"{limit:.2f}"), f"{share:.4f}")
    return None


def _repetitions(text: str, words: list[str]) -> Iterator[tuple[str, float, float]]:
    """The rules of repetition: what is repeated, its share, and the limit of that."""
    for name, parts in (
        ("lines", _stripped(text.splitlines())),
        ("paragraphs", _stripped(re.split(r"\n\s*\n", text))),
    ):
        again, lengths = _occurs_again(parts), list(map(len, parts))
        yield f"duplicate {name} above {{}} of all", _share(again), 0.3
        yield f"duplicate {name} above {{}} of the text", sum(compress(lengths, again)) / max(1, sum(lengths)), 0.2
    if not _is_unspaced(words):
        yield from _n_grams(words)


def _n_grams(words: list[str]) -> Iterator[tuple[str, float, float]]:
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    ends = np.cumsum([0, *map(len, words)])

    def share(starts: np.ndarray, n: int) -> float:
        """Of the characters, those in n-grams that start where `starts` is true."""
        covered = np.zeros(len(words), bool)
        for i in range(n):
            covered[i : i + len(starts)] |= starts
        return float(np.diff(ends)[covered].sum() / ends[-1])

    grams = ids
    for n in range(2, min(10, len(words)) + 1):
        # The number of an (n - 1)-gram and that of its next word make one number, so equal numbers are equal n-grams.
        pairs = grams[:-1] * len(numbers) + ids[n - 1 :]
        distinct, first, grams, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if len(distinct) == len(pairs):  # Then longer ones are distinct, too.
            return
        if n in TOP_N_GRAMS:
            lengths = ends[first + n] - ends[first]
            top = np.argmax(np.where(counts == counts.max(), lengths, 0))
            yield f"most frequent {n}-gram above {{}} of the text", share(grams == top, n), TOP_N_GRAMS[n]
        elif n in DUPLICATE_N_GRAMS:
            again = first[grams] != np.arange(len(grams))
            yield f"duplicate {n}-grams above {{}} of the text", share(again, n), DUPLICATE_N_GRAMS[n]


def _is_unspaced(words: list[str]) -> bool:
    """True of text that is mostly in scripts without spaces."""
    return sum(map(bool, map(IS_UNSPACED.match, words))) > len(words) / 2


def _stripped(parts: Iterable[str]) -> list[str]:
    return [part for part in map(str.strip, parts) if part]


def _occurs_again(parts: list[str]) -> list[bool]:
    """Of each part, whether an equal one is before it."""
    first = {part: i for i, part in reversed(list(enumerate(parts)))}
    return [first[part] != i for i, part in enumerate(parts)]


def _share(items: Iterable[object]) -> float:
    """Of the items, those that are true; 0 of none."""
    true = list(map(bool, items))
    return sum(true) / max(1, len(true))
