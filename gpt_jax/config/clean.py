"""Section of the configuration for cleaning: which documents are kept for pretraining, and what is changed in them."""

from dataclasses import dataclass
from typing import Literal

from gpt_jax.config.check import check, check_types

NormalizeName = Literal["none", "nfc", "nfkc"]
DedupName = Literal["none", "exact", "minhash"]


@dataclass(frozen=True)
class CleanConfig:
    """How documents are cleaned before they become tokens. By default, all of them are kept as they are."""

    normalize: NormalizeName = "none"  # Unicode form to write text in; nfkc also replaces ligatures, wide letters...
    dedup: DedupName = "none"  # Documents to keep once: those of equal text, or with minhash also those much alike.
    dedup_threshold: float = 0.8  # Jaccard similarity, of sets of 5 words in a row, at which documents are alike.
    min_chars: int = 0  # Shortest document to keep, in characters.
    max_chars: int = 0  # Longest document to keep, in characters; 0: no limit.
    min_words: int = 0  # Shortest document to keep, in words; 0: 50 with gopher_quality, and otherwise no limit.
    max_words: int = 0  # Longest document to keep, in words; 0: 100,000 with gopher_quality, and otherwise no limit.
    gopher_quality: bool = False  # Remove by Gopher's rules of word length, symbols, bullets, ellipses and stop words.
    gopher_repetition: bool = False  # Remove by Gopher's rules of repeated lines, paragraphs and words in a row.
    min_stop_words: int = 2  # English stop words that gopher_quality asks for; 0 for text in other languages.
    languages: tuple[str, ...] = ()  # Languages to keep, such as en or zh, told by 4,096 characters; empty: all.
    min_language_probability: float = 0.5  # Least probability of being in that language.

    def __post_init__(self) -> None:
        check_types(self, "")
        threshold, words = self.dedup_threshold, self.min_stop_words
        check(0.5 <= threshold <= 1, "dedup_threshold", threshold, "between 0.5 and 1")
        check(0 <= words <= 8, "min_stop_words", words, "between 0 and 8, the number of stop words")
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            check(least >= 0, f"min_{unit}", least, "0 (no limit) or more")
            check(most == 0 or most >= max(least, 1), f"max_{unit}", most, f"0 (no limit), or min_{unit} or more")
        codes = all(isinstance(code, str) and code for code in self.languages)
        check(codes, "languages", self.languages, "codes of languages, such as en")
        probability = self.min_language_probability
        check(0 <= probability <= 1, "min_language_probability", probability, "between 0 and 1")

    @property
    def word_limits(self) -> tuple[int, int]:
        """The least and the largest number of words of a document that is kept; a largest of 0 is no limit."""
        least, most = (50, 100_000) if self.gopher_quality else (0, 0)
        return self.min_words or least, self.max_words or most

    @property
    def active(self) -> bool:
        """True when a document may be removed or changed."""
        limits = (self.min_chars, self.max_chars, *self.word_limits)
        steps = (self.gopher_quality, self.gopher_repetition, self.languages)
        return self.normalize != "none" or self.dedup != "none" or any(limits) or any(steps)
