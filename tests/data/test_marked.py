"""Tokens as text: nothing lost, nothing that acts on a terminal or a page, and marks where the learnt tokens are."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.marked import Run, as_text, escaped, in_html, runs, shortened
from gpt_jax.interop.load import named_tokenizer
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests.llama_cpp import TEXTS

TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special_tokens


def _characters(found: list[Run]) -> list[tuple[str, bool, bool]]:
    return [(c, run.learnt, run.special) for run in found for c in run.text]


some_runs = st.lists(st.builds(Run, st.text(min_size=1), st.booleans(), st.booleans()), max_size=8)


@given(st.lists(st.tuples(st.text(min_size=1), st.booleans(), st.sampled_from([None, *SPECIAL])), max_size=6))
def test_the_runs_are_the_text(parts: list[tuple[str, bool, str | None]]) -> None:
    """Of texts of which each is learnt or not, some followed by a special token."""
    ids, learnt, expected = list[int](), list[bool](), list[tuple[str, bool, bool]]()
    for text, mark, special in parts:
        found = [*TOKENIZER.encode(text), *([] if special is None else [SPECIAL[special]])]
        ids, learnt = ids + found, learnt + [mark] * len(found)
        expected += [(c, mark, False) for c in text]
        expected += [] if special is None else [(c, mark, True) for c in special]
    ours = runs(TOKENIZER, np.array(ids, np.int32), np.array(learnt, bool))
    assert _characters(ours) == expected
    unmarked = runs(TOKENIZER, np.array(ids, np.int32))
    assert "".join(run.text for run in unmarked) == TOKENIZER.decode(ids)
    assert not any(run.learnt for run in unmarked)


def test_a_character_that_is_cut_is_no_character() -> None:
    ids = np.array(TOKENIZER.encode("语"), np.int32)
    assert runs(TOKENIZER, ids[1:]) == [Run("\ufffd\ufffd")]
    assert runs(TOKENIZER, ids[:2]) == [Run("\ufffd")]
    assert [run.learnt for run in runs(TOKENIZER, ids, np.array([True, False, False]))] == [True, False]


@given(st.text())
def test_what_is_shown_does_nothing(text: str) -> None:
    shown = escaped(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)


def test_what_is_escaped() -> None:
    assert escaped("\x1b[31m\r\u202e\x85\ud800") == r"\x1b[31m\r\u202e\x85\ud800"
    kept = "a\tb\nc\u3000d\u00a0\u8a9e \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e"
    assert escaped(kept) == kept


@given(some_runs, st.integers(0, 60))
def test_the_middle_is_left_out(found: list[Run], most: int) -> None:
    characters = _characters(found)
    ours = shortened(found, most)
    if len(characters) <= most:
        assert ours == found
        return
    [note] = [i for i, run in enumerate(ours) if run.text.startswith(" [... ")]
    head, tail = (_characters(part) for part in (ours[:note], ours[note + 1 :]))
    assert head == characters[: most - most // 2]
    assert tail == characters[len(characters) - most // 2 :]
    assert f" {len(characters) - most:,} characters" in ours[note].text


@given(some_runs)
def test_brackets_are_around_what_is_learnt(found: list[Run]) -> None:
    found = [run._replace(text=re.sub("[⟦⟧]", "", run.text)) for run in found]
    shown = as_text(found, color=False)
    marks, learnt = list[tuple[str, bool]](), False
    for c in shown:
        if c in "⟦⟧":
            assert learnt == (c == "⟧")
            learnt = not learnt
        else:
            marks.append((c, learnt))
    assert marks == [(c, run.learnt) for run in found for c in escaped(run.text)]
    assert "⟧⟦" not in re.sub("⟦⟧", "", shown)


@given(some_runs)
def test_each_line_has_its_own_colours(found: list[Run]) -> None:
    codes = {(False, False): "", (True, False): "32", (False, True): "1", (True, True): "1;32"}
    characters = [(c, codes[run.learnt, run.special]) for run in found for c in escaped(run.text)]
    shown, state = list[tuple[str, str]](), ""
    for line in re.split("(\n)", as_text(found, color=True)):
        for part in re.split(r"(\x1b\[[0-9;]*m)", line):
            if code := re.fullmatch(r"\x1b\[([0-9;]*)m", part):
                state = code[1].removeprefix("0")
            else:
                shown += [(c, state) for c in part]
        assert state == ""
    assert [(c, s) for c, s in shown if c != "\n"] == [(c, s) for c, s in characters if c != "\n"]
    assert [c for c, _ in shown] == [c for c, _ in characters]


class Page(html.parser.HTMLParser):
    """The characters of a page, each with the elements that it is in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.within: list[str] = []
        self.characters: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag

    def handle_data(self, data: str) -> None:
        self.characters += [(c, [*self.within]) for c in data]


@given(some_runs)
def test_a_page_shows_the_characters(found: list[Run]) -> None:
    """As a browser reads them, whatever they would mean in HTML."""
    expected = [(c, ["mark"] * run.learnt + ["b"] * run.special) for run in found for c in escaped(run.text)]
    assert Page(in_html(found)).characters == expected


def test_text_that_looks_like_html_is_text() -> None:
    shown = in_html([Run("<b>&amp;", True), Run("</mark>", True, True)])
    assert shown == "<mark>&lt;b&gt;&amp;amp;<b>&lt;/mark&gt;</b></mark>"


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "llama-bpe"])
def test_documents_of_published_vocabularies_are_shown_as_they_were(name: str, llama_cpp_vocabularies: Path) -> None:
    """With every space, also of those that put one before a text, and of tokens that spell characters in bytes."""
    tokenizer = named_tokenizer(str(llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf"))
    assert tokenizer is not None
    names = {i: special for special, i in tokenizer.special_tokens.items()}
    begin, end = tokenizer.begin_of_text, tokenizer.end_of_text
    begins = [begin] if begin not in (None, end) else []
    for text in TEXTS:
        shown = runs(tokenizer, np.array([*begins, *tokenizer.encode(text), end], np.int32))
        special = "".join(run.text for run in shown if run.special)
        assert special == "".join(names[i] for i in (*begins, end) if i is not None)
        assert "".join(run.text for run in shown if not run.special) == text
        if text.isascii():  # Where no token is a part of a character.
            ids = np.array(tokenizer.encode(text), np.int32)
            shown = runs(tokenizer, ids, np.arange(len(ids)) % 3 == 1)
            assert "".join(run.text for run in shown) == text
