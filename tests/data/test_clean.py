"""Cleaning: what is kept depends on the documents, their order and the settings alone, and what is removed is told."""

# ruff: noqa: RUF001

import hashlib
import itertools
import json
import multiprocessing
import random
import sys
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import CleanConfig
from gpt_jax.data import clean
from gpt_jax.data.clean import PUNCTUATION, SLOTS, Cleaner, Report, Selection, Verdict, bands, signature
from gpt_jax.data.corpora import python_docs
from gpt_jax.data.gopher import WORD
from gpt_jax.errors import UserError

pytest.importorskip("rensa")
pytest.importorskip("py3langid")


def cleaned(texts: Iterable[str], **settings: Any) -> tuple[list[str], Report]:
    """The texts that are kept, and the report."""
    config = CleanConfig(**settings)
    cleaner, selection = Cleaner(config), Selection(config)
    verdicts = [(f"document {i}", cleaner(text)) for i, text in enumerate(texts)]
    return [verdict.text for where, verdict in verdicts if selection.keep(where, verdict)], selection.report


def rule_of(text: str, **settings: Any) -> str:
    """The rule that removes a text; empty when it is kept."""
    return next(iter(cleaned([text], **settings)[1].removed), "")


def sections(n_words: int) -> list[str]:
    """Real text in documents of about n_words words."""
    words = [document.split() for document in python_docs()]
    return [" ".join(part[i : i + n_words]) for part in words for i in range(0, len(part) - n_words, n_words)]


# Settings.


@given(st.lists(st.text(), max_size=5))
def test_by_default_documents_are_kept_as_they_are(texts: list[str]) -> None:
    kept, report = cleaned(texts)
    assert kept == texts
    assert (report.removed, report.changed_documents, report.documents_in_part) == ({}, 0, 0)
    assert not CleanConfig().active


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": "nfc"},
        {"dedup": "exact"},
        {"min_chars": 1},
        {"max_chars": 1},
        {"min_words": 1},
        {"max_words": 1},
        {"gopher_quality": True},
        {"gopher_repetition": True},
        {"languages": ("en",)},
    ],
)
def test_each_setting_makes_it_active(settings: dict[str, Any]) -> None:
    assert CleanConfig(**settings).active


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "NFC"}, "normalize = 'NFC' is not possible: it must be none or nfc or nfkc"),
        ({"dedup": "fuzzy"}, "dedup = 'fuzzy' is not possible: it must be none or exact or minhash"),
        ({"dedup_threshold": 0.4}, "dedup_threshold = 0.4 is not possible: it must be between 0.5 and 1"),
        ({"min_words": -1}, "min_words = -1 is not possible: it must be 0"),
        ({"min_chars": 9, "max_chars": 8}, "max_chars = 8 is not possible: it must be 0 .* or min_chars or more"),
        ({"min_stop_words": 9}, "min_stop_words = 9 is not possible: it must be between 0 and 8"),
        ({"languages": ("",)}, "languages = .* it must be codes of languages"),
        ({"languages": ("en", "english")}, r"languages = .*'english'.* it must be some of ace, af, .*, zh, "),
        ({"min_language_probability": 1.5}, "min_language_probability = 1.5 is not possible"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cleaner(CleanConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "module", "message"),
    [
        ({"dedup": "minhash"}, "rensa", r"similar needs rensa: pip install 'gpt-jax\[clean\]'"),
        ({"languages": ("en",)}, "py3langid.langid", r"apart needs py3langid: pip install 'gpt-jax\[clean\]'"),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], module: str, message: str
) -> None:
    clean._rensa.cache_clear()
    clean._language_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        Cleaner(CleanConfig(**settings))


# One document.


@given(st.lists(st.text() | st.sampled_from(["e\u0301", "ﬁ", "Å", "각"]), max_size=5).map("".join))
def test_text_is_normalised(text: str) -> None:
    for name in ("nfc", "nfkc"):
        [kept], report = cleaned([text], normalize=name)
        assert kept == unicodedata.normalize(name.upper(), text)  # type: ignore[arg-type]
        assert report.changed_documents == (kept != text)
        assert (report.bytes, report.kept_bytes) == (len(text.encode()), len(kept.encode()))


def test_length_has_limits() -> None:
    text = "one two three"
    for unit, n in (("chars", 13), ("words", 3)):
        name = {"chars": "characters", "words": "words"}[unit]
        assert rule_of(text, **{f"min_{unit}": n, f"max_{unit}": n}) == ""
        assert rule_of(text, **{f"min_{unit}": n + 1}) == f"fewer than {n + 1} {name}"
        assert rule_of(text, **{f"max_{unit}": n - 1}) == f"more than {n - 1} {name}"


def test_gopher_has_limits_of_words_which_can_be_set() -> None:
    for n, rule in ((49, "fewer than 50 words"), (50, ""), (100_000, ""), (100_001, "more than 100,000 words")):
        assert rule_of("that have " * (n // 2) + "that" * (n % 2), gopher_quality=True) == rule
    assert rule_of("that have", gopher_quality=True, min_words=2) == ""
    assert rule_of("", gopher_quality=True) == "fewer than 50 words"


def test_gopher_judges_quality_and_repetition_apart() -> None:
    assert rule_of("that have " * 50, gopher_quality=True) == ""
    assert rule_of("that have " * 50, gopher_repetition=True) == "most frequent 2-gram above 0.20 of the text"
    assert rule_of("what had " * 50, gopher_quality=True) == "fewer than 2 English stop words"
    assert rule_of("what had " * 50, gopher_quality=True, min_stop_words=0) == ""


# The first article of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "zh": "人人生而自由,在尊严和权利上一律平等。",
}


def test_languages_are_told_apart() -> None:
    for language, text in ARTICLE.items():
        assert cleaned(ARTICLE.values(), languages=(language,))[0] == [text]
    assert cleaned(ARTICLE.values(), languages=("zh", "en"))[0] == [ARTICLE["en"], ARTICLE["zh"]]


def test_a_language_has_a_least_probability() -> None:
    language, probability = clean._language_identifier().classify("ok")
    assert 0.01 < probability < 0.99
    assert rule_of("ok", languages=(language,), min_language_probability=probability) == ""
    least = round(probability + 0.01, 2)
    assert rule_of("ok", languages=(language,), min_language_probability=least) == f"not {language} by {least} or more"
    assert rule_of(ARTICLE["en"], languages=("en", "de"), min_language_probability=1) == "not en or de by 1.00 or more"


def test_long_documents_are_judged_by_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "JUDGED_CHARS", 1000)
    first = " ".join(ARTICLE.values())[:1000]
    texts = [first, first + " x" * 500, first + " y" * 501]
    kept, report = cleaned(texts, dedup="minhash")
    assert (kept, report.documents_in_part) == ([first], 2)
    kept, report = cleaned(texts, dedup="exact")
    assert (kept, report.documents_in_part) == (texts, 0)
    again = "the same line\n" * 30
    assert rule_of(again + first, gopher_repetition=True) == "duplicate lines above 0.30 of all"
    assert rule_of(first + again, gopher_repetition=True) == ""
    n_words = len(WORD.findall(texts[1]))
    assert rule_of(texts[1], gopher_quality=True, min_words=n_words, min_stop_words=0) != f"fewer than {n_words} words"
    assert rule_of(texts[1], gopher_quality=True, min_words=n_words + 1) == f"fewer than {n_words + 1} words"
    assert rule_of(" " * 1000 + "word", gopher_quality=True, min_words=1) == "mean length of words not 3 to 10"


# Duplicates.


@given(st.lists(st.sampled_from(["a", "b", " a", "a\n", "é", "e\u0301", "", " "]), max_size=12))
def test_the_first_of_equal_texts_is_kept(texts: list[str]) -> None:
    normalised = [unicodedata.normalize("NFC", text) for text in texts]
    first = {text.strip(): text for text in reversed(normalised)}
    kept, report = cleaned(texts, dedup="exact", normalize="nfc")
    assert kept == list(dict.fromkeys(first[text.strip()] for text in normalised))
    for removed in report.removed.values():
        for where, value, _ in removed.examples:
            this, other = (normalised[int(name.removeprefix("document "))].strip() for name in (where, value))
            assert this == other
            assert where > value or len(where) > len(value)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = [word for word in (word.strip(PUNCTUATION) for word in text.lower().split()) if word]
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def at_least(matches: int, similarity: float) -> float:
    """Probability that of SLOTS independent slots, each equal with a probability of `similarity`, so many are."""
    return sum(comb(SLOTS, k) * similarity**k * (1 - similarity) ** (SLOTS - k) for k in range(matches, SLOTS + 1))


def test_planted_near_duplicates_are_found() -> None:
    """An edit is removed when its signature agrees with another in a whole band, 16 of 8 slots, and in 103 slots of 128
    or more (0.8). With probability p of each, and independent slots, both happen with p1 + p2 - 1 or more, and p2 or
    less: at a similarity of 0.9 with 0.998 or more, at one of 0.65 with 0.0001 or less."""
    least = at_least(103, 0.9) + (1 - (1 - 0.9**8) ** 16) - 1
    most = at_least(103, 0.65)
    assert (bands(0.8), least > 0.998, most < 1e-4) == (16, True, True)

    rng = random.Random(0)
    originals = sections(250)
    edited = []
    for i, original in enumerate(originals):
        words = original.split()
        for at in rng.sample(range(len(words)), i % 26):
            words[at] = f"edit{at}"
        edited.append(" ".join(words))
    config = CleanConfig(dedup="minhash")
    cleaner, selection = Cleaner(config), Selection(config)
    for i, text in enumerate(originals):
        selection.keep(str(i), cleaner(text))
    [similarity, found] = zip(
        *((jaccard(a, b), not selection.keep("", cleaner(b))) for a, b in zip(originals, edited, strict=True)),
        strict=True,
    )
    close = [f for s, f in zip(similarity, found, strict=True) if s >= 0.9]
    far = [f for s, f in zip(similarity, found, strict=True) if s <= 0.65]
    assert min(len(close), len(far)) > 100
    assert sum(close) >= len(close) - 2  # Of which the theory loses 0.002.
    assert sum(far) <= 1
    assert sum(s >= 0.7 for s, f in zip(similarity, found, strict=True) if f) >= 0.99 * sum(found)


def test_different_texts_are_no_near_duplicates() -> None:
    """What is removed from real text is similar to what it is said to be similar to."""
    texts = [text for size in (50, 200) for text in sections(size)]
    config = CleanConfig(dedup="minhash")
    cleaner, selection = Cleaner(config), Selection(config)
    kept = {str(i) for i, text in enumerate(texts) if selection.keep(str(i), cleaner(text))}
    assert len(kept) > 0.9 * len(texts)
    for removed in selection.report.removed.values():
        for where, value, _ in removed.examples:
            assert value in kept
            assert jaccard(texts[int(where)], texts[int(value)]) > 0.65


def test_what_is_removed_is_like_something_that_is_kept() -> None:
    """So no chain of small edits leads from one text to another."""
    words = sections(300)[0].split()
    chain = [" ".join([*(f"edit{j}" for j in range(i)), *words[i:]]) for i in range(0, 301, 10)]
    kept, _ = cleaned(chain, dedup="minhash")
    assert kept[0] == chain[0]
    assert len(kept) > 3
    assert all(max(jaccard(text, other) for other in kept) > 0.7 for text in chain)


def test_the_first_of_several_that_are_similar_is_named() -> None:
    *others, text = sections(200)[:10]
    words = text.split()
    edited = [" ".join([*words[:at], *(f"edit{at + i}" for i in range(10)), *words[at + 10 :]]) for at in (50, 150)]
    assert jaccard(*edited) < 0.76 < 0.85 < min(jaccard(text, other) for other in edited)
    _, report = cleaned([*others, *edited, text], dedup="minhash")
    [removed] = report.removed.values()
    assert [example[:2] for example in removed.examples] == [("document 11", "document 9")]


def test_punctuation_and_case_make_no_difference_to_similarity() -> None:
    a, b = "The cat sat on the mat, and slept.", "“the cat” sat on the mat — AND SLEPT"
    assert signature(WORD.findall(a)) == signature(WORD.findall(b)) != signature(WORD.findall(a + " well"))
    assert signature([]) == signature(["--", "…"]) == b""
    assert cleaned([a, b, "", "…", "?"], dedup="minhash")[0] == [a, "", "…", "?"]


def test_bands_compare_nine_of_ten_at_the_threshold() -> None:
    def probability(threshold: float, b: int) -> float:
        return 1 - (1 - threshold ** (SLOTS / b)) ** b

    for threshold in (0.5 + i / 1000 for i in range(501)):
        b = bands(threshold)
        assert SLOTS % b == 0
        assert probability(threshold, b) >= 0.9
        assert b == 4 or probability(threshold, b // 2) < 0.9


def test_signatures_are_the_same_as_ever() -> None:
    """Another version of rensa that changes them would change which documents are kept."""
    texts = ["one", "one two three four five six", *ARTICLE.values(), " ".join(map(str, range(100_000)))]
    digest = hashlib.sha256(b"".join(signature(WORD.findall(text)) for text in texts)).hexdigest()
    assert digest == "97aa7324932c2def8dc6dccc99347340cae70f27e005685e88ca080cab09e833"


# Many documents.


def verdicts_of(cleaner: Cleaner, texts: list[tuple[int, str]]) -> list[tuple[int, Verdict]]:
    return [(i, cleaner(text)) for i, text in texts]


def test_what_is_kept_does_not_depend_on_the_workers() -> None:
    texts = list(enumerate([*sections(60)[:300], *sections(61)[:300], *ARTICLE.values()] * 2))
    config = CleanConfig(
        normalize="nfkc", dedup="minhash", gopher_repetition=True, languages=("en", "zh"), max_words=60
    )
    cleaner = Cleaner(config)

    def result(verdicts: Iterable[tuple[int, Verdict]]) -> tuple[list[str], dict[str, Any]]:
        selection = Selection(config)
        return [v.text for i, v in sorted(verdicts) if selection.keep(str(i), v)], selection.report.to_dict()

    alone = result(verdicts_of(cleaner, texts))
    assert len(alone[0]) > 100
    assert len(alone[1]["removed"]) >= 4
    random.Random(0).shuffle(texts)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        groups = [texts[i : i + 97] for i in range(0, len(texts), 97)]
        verdicts = itertools.chain.from_iterable(pool.map(verdicts_of, itertools.repeat(cleaner), groups))
        assert result(verdicts) == alone


@given(st.lists(st.text("ab \né…#", max_size=20), max_size=30))
def test_the_report_adds_up(texts: list[str]) -> None:
    kept, report = cleaned(texts, dedup="minhash", gopher_quality=True, min_words=2, min_stop_words=0)
    removed = report.removed.values()
    assert report.documents == len(texts) == len(kept) + sum(of.documents for of in removed)
    assert (
        report.bytes == sum(len(text.encode()) for text in texts) == report.kept_bytes + sum(of.bytes for of in removed)
    )
    assert report.kept_documents == len(kept)
    for of in removed:
        assert len(of.examples) == min(3, of.documents)
        assert all(texts[int(where.split()[1])].startswith(excerpt) for where, _, excerpt in of.examples)


def test_the_report_is_printed_in_aligned_lines_and_held_by_json() -> None:
    long = "All human beings " * 70_000
    texts = ["ﬁne", long, "fine\n", *["a line\nin two"] * 4, "A LINE in two", "short"]
    kept, report = cleaned(texts, dedup="minhash", normalize="nfkc", min_chars=3, min_words=1, max_chars=2_000_000)
    assert kept == ["fine", long, "a line\nin two", "short"]
    assert (
        "\n".join(report.lines())
        == """
documents                                                           9 documents          1.2 MB
kept                                                                4 documents          1.2 MB
  of them, in another Unicode form                                  1 documents
judged by their first 1,048,576 characters                          1 documents
removed: equal to a document before                                 4 documents          0.0 MB
  document 2 (document 0): 'fine\\n'
removed: similar to a document before, by 0.80 or more              1 documents          0.0 MB
  document 7 (document 3): 'A LINE in two'
""".strip()
    )
    n_bytes = len(long) + 5 + 5 + 4 * 13 + 13 + 5
    assert json.loads(json.dumps(report.to_dict())) == {
        "documents": 9,
        "bytes": n_bytes,
        "kept_documents": 4,
        "kept_bytes": n_bytes - 5 - 3 * 13 - 13 - 1,
        "changed_documents": 1,
        "documents_in_part": 1,
        "removed": {
            "equal to a document before": {
                "documents": 4,
                "bytes": 5 + 3 * 13,
                "examples": [
                    {"where": "document 2", "value": "document 0", "excerpt": "fine\n"},
                    {"where": "document 4", "value": "document 3", "excerpt": "a line\nin two"},
                    {"where": "document 5", "value": "document 3", "excerpt": "a line\nin two"},
                ],
            },
            "similar to a document before, by 0.80 or more": {
                "documents": 1,
                "bytes": 13,
                "examples": [{"where": "document 7", "value": "document 3", "excerpt": "A LINE in two"}],
            },
        },
    }
