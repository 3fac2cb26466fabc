"""The part `decode` of the benchmarks: with and without a cache, PyTorch's answers are ours. Needs torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import decode, theirs  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402
from gpt_jax.config import ModelConfig  # noqa: E402
from gpt_jax.errors import UserError  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_contestants")]

TINY = ModelConfig(vocab_size=128, context_length=256, n_layer=2, n_head=2, d_model=32, dtype="float32")
MACHINE = {"platform": "cpu", "versions": {}, "flags": {}, "name": "test"}


@pytest.fixture(scope="module")
def ours() -> tuple[Any, Any]:
    """The weights, and what gpt_jax answers greedily."""
    with Worker("benchmarks.ours:Decoding", model=TINY) as worker:
        parameters = worker.ask("initial")
        worker.ask("ready", parameters=parameters)
        return parameters, worker.ask("greedy", batch=3, prompt=5, new=40)


def test_all_contestants_choose_the_same_tokens(ours: tuple[Any, Any]) -> None:
    parameters, (tokens, logprobs) = ours
    for contestant in (theirs.Decoding(TINY), theirs.Decoding(TINY, cached=False), theirs.HuggingFaceDecoding(TINY)):
        contestant.ready(parameters)
        their_tokens, their_logprobs = contestant.greedy(batch=3, prompt=5, new=40)
        np.testing.assert_array_equal(their_tokens, tokens)
        np.testing.assert_allclose(their_logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_a_cache_changes_nothing(ours: tuple[Any, Any], top_k: int) -> None:
    answers = []
    for cached in (True, False):
        contestant = theirs.Decoding(TINY, cached)
        contestant.ready(ours[0])
        torch.manual_seed(1)
        answers.append(contestant.answer(batch=2, prompt=4, new=20, top_k=top_k))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_sequences_that_part_are_compared_until_they_do() -> None:
    ours = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[-1.0, -2.0, -3.0, -4.0]] * 2)
    others = (
        np.array([[1, 2, 9, 4], [5, 6, 7, 8]]),
        np.array([[-1.0, -2.0, -3.25, -9.0], [-1.0, -2.0, -3.0, -4.5]]),
    )
    found = decode.difference(ours, others)
    assert found == {"same_tokens": 0.75, "logprobs": pytest.approx(np.sqrt((0.25**2 + 0.5**2) / 7))}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_part_measures_a_row_for_each_batch_and_none_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "NEW", 8)
    monkeypatch.setattr(decode, "NEW_SLOW", 8)
    monkeypatch.setattr(decode, "LONG_PROMPT", 40)
    monkeypatch.setattr(decode, "PARITY_TOKENS", 8)
    path = tmp_path / "test.json"
    decode.run(Results(path, MACHINE), MACHINE, rounds=1, batches=(1,), model=TINY)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["decode/1", "decode/1, prompt 40"]
    one = rows["decode/1"]
    assert one["failed"] == {}
    assert set(one["modes"]["greedy"]["contestants"]) == set(one["peak_bytes"])
    assert set(one["modes"]["top_50"]["times_as_fast"]) == {"transformers", "pytorch, cache"}
    assert one["bandwidth"]["max"] > 0
    assert set(one["memory"]["gpt_jax"]) == {"libraries", "state", "temporaries"}
    assert one["memory"]["gpt_jax"]["state"] > 4 * TINY.n_params
    assert "pytorch, no cache" not in rows["decode/1, prompt 40"]["peak_bytes"]

    capsys.readouterr()
    decode.run(Results(path, MACHINE), MACHINE, rounds=1, batches=(1,), model=TINY)
    assert capsys.readouterr().out.count("measured already") == 2


def test_no_parity_no_timing() -> None:
    answers = {name: (np.array([[token]]), np.array([[-1.0]])) for name, token in (("gpt_jax", 1), ("transformers", 2))}
    with pytest.raises(UserError, match=r"gpt_jax and transformers do not compute the same.*: tokens differ"):
        decode.check_parity("float32", answers)
    assert decode.check_parity("bfloat16", answers)["transformers"] == {"same_tokens": 0.0, "logprobs": 0.0}
