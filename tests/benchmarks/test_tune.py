"""The part `tune` of the benchmarks, with small models. Needs torch, transformers and TRL."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")

from benchmarks import letters, ours, parity, tables, trainers, tune
from benchmarks.presets import Preset
from gpt_jax.config import ParallelConfig
from gpt_jax.errors import UserError

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_contestants")]

MACHINE = {"platform": "cpu", "cores": 2, "devices": 1}
SIZES = tune.Sizes(text=60_000, vocab_size=400)


def preset(context_length: int, batch_size: int) -> Preset:
    """A small model, and two steps a turn."""
    return Preset("small", tune.gpt2("cpu", 261, 1, 2, 16, context_length), batch_size, steps=2)


@pytest.mark.exhaustive
def test_conversations_are_learnt_by_all() -> None:
    row = tune.tune_conversations(preset(256, batch_size=4), MACHINE, 1, (), SIZES)
    assert row["failed"] == {}
    assert set(row["contestants"]) == {"gpt_jax", "gpt_jax, padded", "transformers"}
    assert set(row["times_as_fast"]) == {"gpt_jax, padded", "transformers"}
    assert row["parity"]["transformers"]["losses"] < parity.TOLERANCES["float32"]["losses"]
    for found in row["contestants"].values():
        assert found["learnt_per_second"]["median"] > 0
        assert 0 < found["learnt_share"] < found["text_share"] <= 1
    written, _, *nothing = tables.tune({"tune/conversations/docstrings": row})
    assert [line.split(" | ")[1] for line in written.splitlines()[2:]] == [*row["contestants"]]
    assert not any(nothing)


@pytest.mark.exhaustive
def test_answers_are_rewarded_by_all() -> None:
    row = tune.tune_rewards(preset(32, batch_size=2), MACHINE, 1, answers=4, new=4)
    assert row["failed"] == {}
    assert set(row["contestants"]) == {"gpt_jax", "TRL"}
    assert row["parity"]["TRL"]["log-probabilities"] < 1e-4
    assert all(found["step_ms"]["median"] > 0 for found in row["contestants"].values())
    assert row["times_as_fast"].keys() == {"TRL"}
    shares = [row["contestants"]["gpt_jax"][f"{part}_share"] for part in ("rollout", "judging", "training")]
    assert min(shares) > 0
    assert sum(shares) <= 1
    assert row["contestants"]["gpt_jax"]["answer_tokens_per_second_alone"] > 0
    *nothing, written, _ = tables.tune({"tune/rewards/tiny": row})
    assert [line.split(" | ")[1] for line in written.splitlines()[2:]] == [*row["contestants"]]
    assert not any(nothing)


def test_padded_rows_are_the_same_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batches of both, the tokens and those that are targets, row by row; ours have one of a few lengths."""
    monkeypatch.setattr(ours.Training, "__init__", lambda self, preset, parallel: setattr(self, "preset", preset))
    rng = np.random.default_rng(0)
    lengths = (3, 9, 32, 5)
    conversations = [(rng.integers(1, 261, n).astype(np.int32), rng.random(n) < 0.7) for n in lengths]
    small = preset(32, batch_size=2)
    padded, conversing = ours.Padded(small, ParallelConfig(), conversations), trainers.Conversing(small, conversations)
    for step, T in enumerate((8, 32)):
        batch, text = padded.made(step)
        theirs = trainers.padded(conversing.rows(step, 1))
        assert batch.tokens.shape == (2, T + 1)
        assert text == sum(lengths[2 * step : 2 * step + 2]) - (T == 8)
        for b in range(2):
            labels = theirs["labels"][b, 1:].numpy()
            np.testing.assert_array_equal(batch.tokens[b, 1:][batch.mask[b]], labels[labels != trainers.NOT_LEARNT])
            n = int(theirs["attention_mask"][b].sum())
            np.testing.assert_array_equal(batch.tokens[b, :n], theirs["input_ids"][b, :n])
            assert not batch.tokens[b, n:].any()


def test_no_parity_no_timing() -> None:
    losses = {"gpt_jax": [9.0], "gpt_jax, padded": [2.0], "transformers": [2.1]}
    with pytest.raises(UserError, match=r"gpt_jax and transformers do not compute the same.*: losses differ"):
        tune.check_losses(preset(32, 2), losses)
    assert tune.check_losses(preset(32, 2), {"gpt_jax": [9.0], "gpt_jax, padded": [2.0]}) == {}


def test_problems_are_letters_by_number() -> None:
    environment = letters.Letters()
    problem = environment.problems("train")[3]
    assert problem == environment.problems("train")[3] != environment.problems("val")[3]
    assert len(str(problem.prompt).encode()) == letters.PROMPT
    assert environment.reward(problem, "ab1ö") == 0.5
    assert environment.reward(problem, "") == 0
