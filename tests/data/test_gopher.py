"""Gopher's rules, each on a text that breaks it alone, and on one that just does not; shares against their meaning."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.gopher import DUPLICATE_N_GRAMS, TOP_N_GRAMS, WORD, Finding, _n_grams, quality, repetition


def new_words() -> Callable[[int], str]:
    """A function that gives words of a length, each one once."""
    letters = {n: map("".join, itertools.product("bcdfghjklm", repeat=n)) for n in range(2, 30)}
    return lambda length: next(letters[length])


def filler(word: Callable[[int], str], n_chars: int) -> list[str]:
    """Words of 4 to 7 characters, n_chars together."""
    lengths = [4] * (n_chars // 4)
    lengths[-1] += n_chars % 4
    return list(map(word, lengths))


def broken_quality(text: str, min_stop_words: int = 2) -> str:
    finding = quality(text, WORD.findall(text), min_stop_words)
    return finding.rule if finding else ""


def broken_repetition(text: str) -> str:
    finding = repetition(text, WORD.findall(text))
    return finding.rule if finding else ""


def hundred_words(*replaced: str) -> list[str]:
    """The words in `replaced`, two stop words and others: a hundred in all."""
    word = new_words()
    return [*replaced, "the", "of", *(word(5) for _ in range(98 - len(replaced)))]


def lines_of(words: list[str], n: int) -> list[str]:
    return [" ".join(words[i::n]) for i in range(n)]


QUALITY = {
    "hash signs above 0.10 a word": lambda k: " ".join(hundred_words(*["word#"] * (10 + k))),
    "ellipses above 0.10 a word": lambda k: " ".join(hundred_words("w...", *["word…"] * (9 + k))),
    "lines with a bullet above 0.90 of all": lambda k: "\n".join(
        ("- " if i < 5 else "•") * (i < 9 + k) + line for i, line in enumerate(lines_of(hundred_words(), 10))
    ),
    "lines with an ellipsis above 0.30 of all": lambda k: "\n".join(
        line + ("…" if i else "...") * (i < 3 + k) for i, line in enumerate(lines_of(hundred_words(), 10))
    ),
    "words without a letter above 0.20 of all": lambda k: " ".join(hundred_words(*["12.5"] * (20 + k))),
    "mean length of words not 3 to 10": lambda k: " ".join(["and", "the", "ab" if k else "abc"] + ["abc"] * 97),
    "fewer than 2 English stop words": lambda k: " ".join(
        ["that", "That" if k else "With", *map(new_words(), [5] * 98)]
    ),
}


@pytest.mark.parametrize("rule", QUALITY)
def test_a_rule_of_quality_is_broken_from_its_limit_on(rule: str) -> None:
    assert broken_quality(QUALITY[rule](0)) == ""
    assert broken_quality(QUALITY[rule](1)) == rule


def test_words_may_be_ten_characters_long_on_average() -> None:
    words = ["and", "the", "abcde", *["a" * 10] * 96]  # 11 of 30 characters.
    assert broken_quality(" ".join([*words, "a" * 29])) == ""
    assert broken_quality(" ".join([*words, "a" * 30])) == "mean length of words not 3 to 10"


def test_other_languages_need_no_english_stop_words() -> None:
    text = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. " * 10
    assert broken_quality(text) == "fewer than 2 English stop words"
    assert broken_quality(text, min_stop_words=0) == ""


def duplicate_lines(k: int) -> str:
    word = new_words()
    return "\n".join(part for i in range(6 - k) for part in (word(20), *["ab"] * (i < 4 + k)))


def duplicate_line_characters(k: int) -> str:
    word = new_words()
    twice, others = word(20 + k), [word(15) for _ in range(4)]
    return "\n".join([others[0], twice, others[1], twice, *others[2:]])


def duplicate_paragraphs(k: int) -> str:
    word = new_words()
    return "\n\n".join(["ab"] * (4 + k) + ["\n".join(f"{word(20)} {word(20)}" for _ in range(5)) for _ in range(6 - k)])


def duplicate_paragraph_characters(k: int) -> str:
    word = new_words()
    twice, others = f"x\n{' ' * (17 + k)}y", ["\n".join([word(6), *map(word, [5] * 4)]) for _ in range(2)]
    return "\n \n".join([others[0], twice, others[1], twice])


def frequent(n: int) -> Callable[[int], str]:
    def text(k: int) -> str:
        """Four copies of n words of 2 characters, apart."""
        word = new_words()
        gram = [word(2) for _ in range(n)]
        others = filler(word, next(f for f in range(999) if 8 * n / (8 * n + f) <= TOP_N_GRAMS[n]) - k)
        return " ".join(part for i in range(4) for part in (*gram, *others[i::4]))

    return text


def duplicate(n: int) -> Callable[[int], str]:
    def text(k: int) -> str:
        """Two copies of five series of n words of 2 characters, apart."""
        word = new_words()
        series = [[word(2) for _ in range(n)] for _ in range(5)]
        others = filler(word, next(f for f in range(9999) if 10 * n / (20 * n + f) <= DUPLICATE_N_GRAMS[n]) - k)
        return " ".join(part for i in range(10) for part in (*series[i % 5], *others[i::10]))

    return text


REPETITION = {
    "duplicate lines above 0.30 of all": duplicate_lines,
    "duplicate lines above 0.20 of the text": duplicate_line_characters,
    "duplicate paragraphs above 0.30 of all": duplicate_paragraphs,
    "duplicate paragraphs above 0.20 of the text": duplicate_paragraph_characters,
    **{f"most frequent {n}-gram above {limit:.2f} of the text": frequent(n) for n, limit in TOP_N_GRAMS.items()},
    **{f"duplicate {n}-grams above {limit:.2f} of the text": duplicate(n) for n, limit in DUPLICATE_N_GRAMS.items()},
}


@pytest.mark.parametrize("rule", REPETITION)
def test_a_rule_of_repetition_is_broken_from_its_limit_on(rule: str) -> None:
    assert broken_repetition(REPETITION[rule](0)) == ""
    assert broken_repetition(REPETITION[rule](1)) == rule


def test_the_limits_are_those_of_the_paper() -> None:
    assert TOP_N_GRAMS == {2: 0.20, 3: 0.18, 4: 0.16}
    assert DUPLICATE_N_GRAMS == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def shares_by_definition(words: list[str]) -> Iterator[float]:
    """The shares of n-grams, for n from 2 to 10 while there is a duplicate, from sets of characters."""
    order = list(dict.fromkeys(words))
    characters = [{(i, j) for j in range(len(word))} for i, word in enumerate(words)]
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        if len(counts) == len(grams):
            return
        top = min(counts, key=lambda gram: (-counts[gram], -len("".join(gram)), list(map(order.index, gram))))
        if n in TOP_N_GRAMS:
            starts = [i for i, gram in enumerate(grams) if gram == top]
        else:
            starts = [i for i, gram in enumerate(grams) if gram in grams[:i]]
        covered = set().union(*(characters[j] for i in starts for j in range(i, i + n)))
        yield len(covered) / len("".join(words))


@given(st.lists(st.sampled_from(["a", "bb", "é", "文", "a bb ccc d e", "f gg h i j k l mm"]), max_size=20))
def test_shares_of_n_grams_are_what_they_are_defined_to_be(parts: list[str]) -> None:
    words = " ".join(parts).split()
    assert [share for _, share, _ in _n_grams(words)] == pytest.approx(list(shares_by_definition(words)))


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    words = WORD.findall(text)
    assert "".join(words) == "".join(text.split())
    for finding in (quality(text, words, 2), repetition(text, words)):
        assert finding is None or isinstance(finding, Finding)


def test_scripts_without_spaces_have_no_rules_of_words() -> None:
    chinese = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。"
    thai = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ"
    for text in (chinese, thai):
        assert len(WORD.findall(text)) > len(text) / 2
        assert broken_quality(text * 2) == broken_repetition(text * 2) == ""
        assert broken_repetition(f"{text}\n" * 2) == "duplicate lines above 0.30 of all"
    assert WORD.findall("GPT 模型2.0 자유") == ["GPT", "模", "型", "2.0", "자유"]
