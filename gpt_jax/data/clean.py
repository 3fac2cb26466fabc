"""Cleaning of documents for pretraining: Unicode forms, rules of length and quality, languages, duplicates.

It has two parts. `Cleaner` judges each document alone, so it may run in any number of processes. `Selection` is given
the verdicts in the order of the documents, keeps the first of those that are alike, and reports what was removed. What
is kept depends on nothing but the documents, their order and the settings.
"""

import base64
import hashlib
import json
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple

from gpt_jax.config import CleanConfig, check
from gpt_jax.data.gopher import WORD, Finding, quality, repetition
from gpt_jax.errors import UserError

FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}

JUDGED_CHARS = 1 << 20  # Of a document, for quality, repetition and similarity, which take up to 0.4 GB of memory.
LANGUAGE_CHARS = 4096  # Of a document, for its language.
SHINGLE_WORDS = 5  # Words in a row, as in the deduplication of C4 by Lee et al. 2021 (arXiv:2107.06499).
PUNCTUATION = string.punctuation + "–—…‘’“”«»、。《》「」『』【】！（），：；？।،؟"  # noqa: RUF001

SLOTS = 128  # Numbers in a signature: the standard deviation of an estimate is at most 0.045.
SEED = 42
RECALL = 0.9  # Least probability that two documents at the threshold are compared.

SEPARATOR = b"\xff"  # Between documents: no byte of UTF-8.
MAX_EXAMPLES = 3
EXCERPT_CHARS = 60


class Verdict(NamedTuple):
    """What `Cleaner` says of one document."""

    text: str  # To be kept, normalised; or the beginning of a document that is removed.
    n_bytes: int  # Of the document as it was, in UTF-8.
    kept_bytes: int = 0  # Of the text to be kept.
    finding: Finding | None = None  # Why it is removed.
    changed: bool = False  # The text is in another Unicode form than it was.
    in_part: bool = False  # Only the first JUDGED_CHARS were judged.
    digest: bytes = b""  # With dedup: 16 bytes, equal for texts that are equal but for the space around them.
    signature: bytes = b""  # With dedup "minhash": see `signature`.


def normalized(text: str, config: CleanConfig) -> str:
    """The text in the Unicode form that `config` asks for."""
    return text if config.normalize == "none" else unicodedata.normalize(FORMS[config.normalize], text)


@dataclass(frozen=True)
class Cleaner:
    """A pure function from the text of a document to the verdict on it, which can be pickled.

    Raises UserError when it is made, if `config` names an unknown language, or needs a package that is not installed.
    """

    config: CleanConfig

    def __post_init__(self) -> None:
        if self.config.languages:
            known = _language_identifier().labels
            unknown = [code for code in self.config.languages if code not in known]
            check(not unknown, "clean.languages", self.config.languages, f"some of {', '.join(sorted(known))}")
        if self.config.dedup == "minhash":
            _rensa()

    def __call__(self, text: str) -> Verdict:
        """The verdict on a whole document.

        Normalising, length and equality are of all of the text. Rules of quality and repetition, and similarity, are of
        its first JUDGED_CHARS, the language of its first LANGUAGE_CHARS.
        """
        config, n_bytes = self.config, len(text.encode())
        kept = normalized(text, config)
        judges = config.gopher_quality or config.gopher_repetition or config.dedup == "minhash"
        in_part = judges and len(kept) > JUDGED_CHARS
        verdict = Verdict(kept, n_bytes, len(kept.encode()), changed=kept != text, in_part=in_part)
        words = WORD.findall(kept[:JUDGED_CHARS])
        if finding := self._finding(kept, words):
            return verdict._replace(text=kept[:EXCERPT_CHARS], finding=finding)
        if config.dedup != "none":
            verdict = verdict._replace(digest=hashlib.blake2b(kept.strip().encode(), digest_size=16).digest())
        if config.dedup == "minhash":
            verdict = verdict._replace(signature=signature(words))
        return verdict

    def _finding(self, text: str, words: list[str]) -> Finding | None:
        """The first rule that the text breaks; `words` are those of its beginning."""
        config, n_chars = self.config, len(text)
        n_words = len(words) if n_chars <= JUDGED_CHARS else sum(1 for _ in WORD.finditer(text))
        limits = (("characters", n_chars, config.min_chars, config.max_chars), ("words", n_words, *config.word_limits))
        for unit, n, least, most in limits:
            if n < least:
                return Finding(f"fewer than {least:,} {unit}", f"{n:,}")
            if 0 < most < n:
                return Finding(f"more than {most:,} {unit}", f"{n:,}")
        beginning = text[:JUDGED_CHARS]
        if config.gopher_quality and (finding := quality(beginning, words, config.min_stop_words)):
            return finding
        if config.gopher_repetition and (finding := repetition(beginning, words)):
            return finding
        if config.languages:
            language, probability = _language_identifier().classify(text[:LANGUAGE_CHARS])
            if language not in config.languages or probability < config.min_language_probability:
                rule = f"not {' or '.join(config.languages)} by {config.min_language_probability:.2f} or more"
                return Finding(rule, f"{language}, {probability:.2f}")
        return None


def signature(words: list[str]) -> bytes:
    """The MinHash signature of the set of SHINGLE_WORDS words in a row, or of all words if they are fewer.

    words: those of a document, by gopher.WORD; they count in lower case, without the punctuation around them. Returns
    the state of a rensa.RMinHash, about 0.7 kB, the same on every machine; nothing if there is no word.
    """
    bare = [word for word in (word.strip(PUNCTUATION) for word in map(str.lower, words)) if word]
    if not bare:
        return b""
    n = min(SHINGLE_WORDS, len(bare))
    sketch = _rensa().RMinHash(SLOTS, SEED)
    sketch.update(list(map(" ".join, zip(*(bare[i:] for i in range(n)), strict=False))))
    return sketch.__getstate__()


def bands(threshold: float) -> int:
    """The number of bands into which locality-sensitive hashing cuts a signature: of those that divide SLOTS, the
    smallest with which documents at the threshold are compared with a probability of RECALL or more.

    With b bands of r = SLOTS / b slots, documents are compared if they agree in a whole band: those of similarity s
    with a probability of 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2).
    """
    divisors = (4, 8, 16, 32, 64)
    return next(b for b in divisors if 1 - (1 - threshold ** (SLOTS // b)) ** b >= RECALL)


class Example(NamedTuple):
    """A document that was removed."""

    where: str
    value: str  # What breaks the rule, or the document that it is a duplicate of.
    excerpt: str


@dataclass
class Removed:
    """The documents that one rule removed."""

    documents: int = 0
    bytes: int = 0  # As the documents were, in UTF-8.
    examples: list[Example] = field(default_factory=list)  # The first MAX_EXAMPLES.


@dataclass
class Report:
    """What cleaning did."""

    documents: int = 0  # All.
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0  # As they are now.
    changed_documents: int = 0  # Of those kept: in another Unicode form than they were.
    documents_in_part: int = 0  # Of all: judged by their first JUDGED_CHARS.
    removed: dict[str, Removed] = field(default_factory=dict)  # By rule, in the order in which they removed first.

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it: dictionaries, lists, strings and numbers."""
        values = asdict(self)
        for rule, removed in self.removed.items():
            values["removed"][rule]["examples"] = [example._asdict() for example in removed.examples]
        return values

    def lines(self) -> Iterator[str]:
        """The report as aligned lines to print: counts, and an example of each rule, by the documents removed."""
        yield _line("documents", self.documents, self.bytes)
        yield _line("kept", self.kept_documents, self.kept_bytes)
        if self.changed_documents:
            yield _line("  of them, in another Unicode form", self.changed_documents)
        if self.documents_in_part:
            yield _line(f"judged by their first {JUDGED_CHARS:,} characters", self.documents_in_part)
        for rule, removed in sorted(self.removed.items(), key=lambda item: -item[1].documents):
            yield _line(f"removed: {rule}", removed.documents, removed.bytes)
            for where, value, excerpt in removed.examples[:1]:
                yield f"  {where} ({value}): {excerpt!r}"


def _line(name: str, documents: int, n_bytes: int | None = None) -> str:
    size = "" if n_bytes is None else f"{n_bytes / 1e6:>13,.1f} MB"
    return f"{name:<56}{documents:>13,} documents{size}"


class Selection:
    """Keeps documents one by one, given verdicts in the order of the documents, and reports what was removed.

    A document is a duplicate if it equals one that was kept before, or if the estimate of its similarity with one is
    the threshold or more. So each that is removed is like one that is kept: there are no chains of likeness.
    Memory for a million documents kept, by names of 40 characters: 0.24 GB with dedup "exact"; with "minhash" 2.7 GB,
    5 GB at thresholds below 0.78, which take more bands, and 7.5 GB below 0.52. What is removed takes none.
    """

    def __init__(self, config: CleanConfig) -> None:
        self.report = Report()
        self._kept: list[str] = []  # Names.
        self._numbers: dict[bytes, int] = {}  # Of the documents kept, by digest.
        self._threshold = config.dedup_threshold
        self._similar: Any = None
        if config.dedup == "minhash":
            n_bands = bands(self._threshold)
            self._similar = _rensa().RMinHashDeduplicator(self._threshold, SLOTS, True, n_bands, SEED)

    def keep(self, where: str, verdict: Verdict) -> bool:
        """Whether to keep the next document. where: its name in the report."""
        report = self.report
        report.documents += 1
        report.bytes += verdict.n_bytes
        report.documents_in_part += verdict.in_part
        if finding := verdict.finding or self._duplicate(where, verdict):
            removed = report.removed.setdefault(finding.rule, Removed())
            removed.documents += 1
            removed.bytes += verdict.n_bytes
            if len(removed.examples) < MAX_EXAMPLES:
                removed.examples.append(Example(where, finding.value, verdict.text[:EXCERPT_CHARS]))
            return False
        report.kept_documents += 1
        report.kept_bytes += verdict.kept_bytes
        report.changed_documents += verdict.changed
        return True

    def _duplicate(self, where: str, verdict: Verdict) -> Finding | None:
        """What the next document is a duplicate of; None if of nothing, and then it is remembered."""
        if not verdict.digest:
            return None
        if (number := self._numbers.get(verdict.digest)) is not None:
            return Finding("equal to a document before", self._kept[number])
        if verdict.signature:
            sketch = _rensa().RMinHash(SLOTS, SEED)
            sketch.__setstate__(verdict.signature)
            if numbers := self._similar.get_duplicates(sketch):
                rule = f"similar to a document before, by {self._threshold:.2f} or more"
                return Finding(rule, self._kept[min(map(int, numbers))])
            self._similar.add(str(len(self._kept)), sketch)
        self._numbers[verdict.digest] = len(self._kept)
        self._kept.append(where)
        return None


def clean_config(values: dict[str, Any]) -> CleanConfig:
    """The settings of which `values` is the dictionary, as JSON gives it."""
    return CleanConfig(**{**values, "languages": tuple(values["languages"])})


def judged(cleaner: Cleaner, texts: bytes) -> bytes:
    """The verdicts on some documents, with SEPARATOR between them, as JSON that `verdicts` reads."""
    return json.dumps([_fields(cleaner(text.decode())) for text in texts.split(SEPARATOR)]).encode()


def _fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON, with the beginning of its text only."""
    return {
        **verdict._asdict(),
        "text": verdict.text[:EXCERPT_CHARS],
        "digest": base64.b64encode(verdict.digest).decode(),
        "signature": base64.b64encode(verdict.signature).decode(),
    }


def verdicts(content: bytes) -> Iterator[Verdict]:
    """The verdicts of `judged`, with the beginnings of the texts only."""
    for fields in json.loads(content):
        finding = fields["finding"] and Finding(*fields["finding"])
        marks = {name: base64.b64decode(fields[name]) for name in ("digest", "signature")}
        yield Verdict(**{**fields, "finding": finding, **marks})


@cache
def _rensa() -> ModuleType:
    return _optional("rensa", "finding documents that are similar")


@cache
def _language_identifier() -> Any:
    langid = _optional("py3langid.langid", "telling languages apart")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs {package}: pip install 'gpt-jax[clean]'") from None
