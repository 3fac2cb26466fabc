"""The text that a tokenizer is trained on: spread over the corpus, bounded, the same every time."""

import itertools
import json
import signal
import time
from collections import Counter
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.config import TokenizerType
from gpt_jax.data.train_tokenizer import TextSample, train_sentencepiece

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


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(1_000, 60_000),
)
def test_samples_of_parts_make_that_of_the_whole(sizes: list[int], in_part: int, max_bytes: int) -> None:
    """sizes: texts of each source. in_part: sources of a part."""
    sources = [[f"source {i}, text {n} ".encode() * 30 for n in range(size)] for i, size in enumerate(sizes)]
    n_bytes = sum(len(text) for texts in sources for text in texts)

    def add(sample: TextSample, first: int, n: int) -> TextSample:
        for number, texts in enumerate(sources[first : first + n], first):
            sample.begin(number)
            for text in texts:
                sample.add(text)
        return sample

    whole, merged = add(TextSample(max_bytes), 0, len(sources)), TextSample(max_bytes)
    for first in range(0, len(sources), in_part):
        header, content = add(TextSample(max_bytes), first, in_part).packed()
        merged.merge(json.loads(json.dumps(header)), content)
    assert list(merged) == list(whole)
    assert whole.n_bytes == merged.n_bytes <= max_bytes
    if n_bytes <= max_bytes:
        assert whole.n_bytes == n_bytes


@pytest.mark.parametrize("kinds", [["", "text"], ["one", "two"], ["a", "b", "c", "d"]])
def test_short_sources_that_alternate_are_all_in_the_sample(kinds: list[str]) -> None:
    sample = TextSample(20_000)
    for i in range(8000):
        sample.begin(i)
        sample.add(kinds[i % len(kinds)].encode() * 10)
    counts = Counter(sample)
    assert len(counts) == len({*kinds} - {""})
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert 8_000 < sample.n_bytes <= 20_000


@pytest.mark.parametrize("model_type", ["bpe", "char"])
def test_a_signal_is_never_taken_for_a_failure_of_training(model_type: TokenizerType) -> None:
    """Whenever it comes: while the text is made ready, while SentencePiece reads it, and while it trains."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    texts = [LINES[i : i + 4000] for i in range(0, len(LINES), 4000)] * 4

    def train_until_interrupted(after: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, after)
        train_sentencepiece(texts, model_type, 300)
        signal.pause()  # Where training was faster than the signal.

    start = time.perf_counter()
    train_sentencepiece(texts, model_type, 300)
    seconds = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1, 20):
            with pytest.raises(KeyboardInterrupt):
                train_until_interrupted(after=seconds * i / 25)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
