"""The text that a tokenizer is trained on: spread over the corpus, bounded, the same every time."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.train_tokenizer import TextSample

LINES = "".join(f"line {i}, not very long\n" for i in range(10_000))


def test_a_short_text_is_used_whole() -> None:
    sample = TextSample(1 << 20)
    for i in range(0, len(LINES), 50_000):
        sample.add(LINES[i : i + 50_000].encode())
    assert "".join(sample) == LINES
    assert sample.n_bytes == len(LINES)


@given(max_bytes=st.integers(10_000, 200_000))
def test_a_long_text_is_thinned_out_evenly(max_bytes: int) -> None:
    samples = [TextSample(max_bytes), TextSample(max_bytes)]
    for sample in samples:
        sample.add(LINES.encode())
    assert list(samples[0]) == list(samples[1])
    assert max_bytes / 3 < samples[0].n_bytes <= max_bytes
    parts = list(samples[0])
    starts = [LINES.index(part) for part in parts]
    gaps = {b - a for a, b in itertools.pairwise(starts)}
    assert max(gaps) < 1.1 * min(gaps)
