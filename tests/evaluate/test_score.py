"""Scores of windows, against one window at a time in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt_jax.evaluate import score
from gpt_jax.evaluate.score import Scorer
from gpt_jax.evaluate.windows import Window
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from tests.evaluate.model import CONFIG, MODEL, T, log_probabilities_TV, make_params, nats


@pytest.fixture(scope="module")
def params() -> Params:
    return make_params()


@pytest.fixture(scope="module")
def some_windows(params: Params) -> list[Window]:
    """Windows of all lengths, half of which end as the model would go on by itself."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(21):
        tokens = rng.integers(0, 261, rng.integers(2, T + 2)).astype(np.int32)
        n_scored = int(rng.integers(1, min(len(tokens), 4)))
        for t in range(len(tokens) - n_scored, len(tokens) if i % 2 else 0):
            tokens[t] = log_probabilities_TV(params, tokens[:t])[-1].argmax()
        found.append(Window(tokens, len(tokens) - 1 - n_scored))
    return found


@pytest.mark.parametrize(("n_devices", "batch_size"), [(1, 1), (1, 4), (4, 2)])
def test_scores_are_those_of_one_window_at_a_time(
    params: Params, some_windows: list[Window], n_devices: int, batch_size: int
) -> None:
    scores = sorted(Scorer(MODEL, params, Placement(jax.devices()[:n_devices]), batch_size)(some_windows))
    assert [score.number for score in scores] == list(range(len(some_windows)))
    for window, got in zip(some_windows, scores, strict=True):
        assert got.nats == pytest.approx(nats(params, window.tokens, window.n_scored), rel=1e-5)
        best = log_probabilities_TV(params, window.tokens[:-1]).argmax(axis=-1)
        assert got.greedy == (best == window.tokens[1:])[window.seen :].all()
    assert 5 < sum(got.greedy for got in scores) < 20


def test_logits_in_chunks_are_the_same(
    params: Params, some_windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(Scorer(MODEL, params, Placement(jax.devices()[:1]), 4)(some_windows))
    monkeypatch.setattr(score, "CHUNK", 24)  # Neither divides a batch nor is divided by one.
    chunked = list(Scorer(MODEL, params, Placement(jax.devices()[:1]), 4)(some_windows))
    for a, b in zip(whole, chunked, strict=True):
        assert a.number == b.number
        assert a.greedy == b.greedy
        assert a.nats == pytest.approx(b.nats, rel=1e-5)


def test_padding_of_the_vocabulary_has_no_probability(params: Params, some_windows: list[Window]) -> None:
    padded = GPT(dataclasses.replace(CONFIG, vocab_multiple=128))
    rows_VD = 100 * np.ones((384 - 261, 16), np.float32)
    with_padding = {**params, "tokens_VD": np.concatenate([params["tokens_VD"], rows_VD])}
    expected = list(Scorer(MODEL, params, Placement(jax.devices()[:1]), 4)(some_windows))
    for a, b in zip(expected, Scorer(padded, with_padding, Placement(jax.devices()[:1]), 4)(some_windows), strict=True):
        assert a.greedy == b.greedy
        assert a.nats == pytest.approx(b.nats, rel=1e-5)
