"""The trie of chunks, against a list of all prefixes that were kept."""

from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.sample.prefixes import Prefixes


def keep(prefixes: Prefixes, tokens: list[int], key: str = "") -> list[int | None]:
    """Adds all chunks of a prompt, one after the other."""
    return [prefixes.add(key, tokens[:n]) for n in range(prefixes.size, len(tokens) + 1, prefixes.size)]


def test_whole_chunks_are_found() -> None:
    p = Prefixes(10, 2)
    assert keep(p, [1, 2, 3, 4, 5]) == [0, 1]
    assert p.find("", [1, 2, 3, 4, 5, 6]) == [0, 1]
    assert p.find("", [1, 2, 3, 5]) == [0]
    assert p.find("", [1]) == p.find("", [2, 2, 3, 4]) == p.find("other weights", [1, 2]) == []
    assert keep(p, [1, 2, 3, 4]) == [None, None]  # They are there.
    assert keep(p, [1, 2, 9, 9]) == [None, 2]
    assert p.add("", [7, 7, 8, 8]) is None  # The chunk before it is not.


def test_the_chunk_that_was_not_used_for_the_longest_time_goes() -> None:
    p = Prefixes(3, 1)
    keep(p, [1, 2])
    keep(p, [3])
    p.find("", [1, 2])
    assert keep(p, [4]) == [2]  # In place of 3.
    assert keep(p, [5]) == [1]  # In place of 2, which follows 1.
    assert p.find("", [1, 2]) == [0]
    assert p.find("", [3]) == []


def test_a_prompt_does_not_push_out_its_own_beginning() -> None:
    p = Prefixes(2, 1)
    assert keep(p, [1, 2, 3]) == [0, 1, None]
    assert p.find("", [1, 2, 3]) == [0, 1]
    assert Prefixes(0, 1).add("", [1]) is None


prompts = st.lists(st.integers(0, 1), max_size=8)


@given(st.integers(0, 5), st.integers(1, 3), st.lists(st.tuples(st.sampled_from("ab"), prompts), max_size=30))
def test_what_is_found_is_what_was_kept_there(n_places: int, size: int, steps: list[tuple[str, list[int]]]) -> None:
    p = Prefixes(n_places, size)
    content: dict[int, tuple[str, list[int]]] = {}  # By place.
    for key, tokens in steps:
        for n in range(size, len(tokens) + 1, size):
            place = p.add(key, tokens[:n])
            if place is not None:
                content[place] = key, tokens[:n]
        found = p.find(key, tokens)
        assert [content[place] for place in found] == [(key, tokens[: (i + 1) * size]) for i in range(len(found))]
        assert sorted([*p.free, *p.nodes]) == list(range(n_places))
