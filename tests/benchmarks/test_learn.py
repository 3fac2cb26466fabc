"""The benchmark of learning runs, and its two sides learn the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import Results
from tests.cli import TINY

pytest.importorskip("torch")

from benchmarks import learn

pytestmark = [pytest.mark.parity, pytest.mark.slow]

RECIPE = learn.Recipe(
    n_layer=1,
    n_head=2,
    d_model=16,
    context_length=16,
    batch_size=4,
    warmup_steps=5,
    steps=30,
    eval_every=20,
    eval_batches=2,
    target=1.0,
)
OWN = ("configs/shakespeare_char_cpu.py", *TINY, "--train.steps=4", "--train.eval-every=2")
MACHINE = {"platform": "cpu", "versions": {}, "flags": {}}


@pytest.fixture
def text(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat", "rain", "語"], 2000)), encoding="utf-8")
    return path


def test_both_sides_learn_the_same(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.json"
    learn.run(Results(path, MACHINE), MACHINE, 1, RECIPE, text, OWN)
    row = json.loads(path.read_text())["rows"][learn.NAME]
    contestants = row["contestants"]
    assert row["failed"] == {}
    assert set(contestants) == {learn.OURS, *learn.PYTORCH, learn.OWN_RECIPE}
    ours = contestants[learn.OURS]
    assert [iterations for _, iterations, _ in ours["curve"]] == [0, 20, 30]
    for name in learn.PYTORCH:
        theirs = contestants[name]
        np.testing.assert_allclose([x[2] for x in theirs["curve"]], [x[2] for x in ours["curve"]], rtol=1e-4)
        assert theirs["whole_val_loss"] == pytest.approx(ours["whole_val_loss"], rel=1e-4)
        assert row["times_as_fast"][name]["median"] > 0
    own = contestants[learn.OWN_RECIPE]
    assert [iterations for _, iterations, _ in own["curve"]] == [2, 4]
    assert (own["reached"], own["seconds"], own["tokens"]) == (False, None, 4 * 8 * 16)

    before = path.read_bytes()
    learn.run(Results(path, MACHINE), MACHINE, 1, RECIPE, text, OWN)  # Measured already.
    assert path.read_bytes() == before


def test_the_whole_validation_text_has_each_target_once(text: Path) -> None:
    read = learn.read_text(str(text))
    assert len(read.train) == int(0.9 * len(text.read_text(encoding="utf-8")))
    batches = list(learn.whole_val(RECIPE, read))
    inputs = np.concatenate([tokens[:, :-1][mask_BT] for tokens, mask_BT in batches])
    targets = np.concatenate([tokens[:, 1:][mask_BT] for tokens, mask_BT in batches])
    np.testing.assert_array_equal(inputs, read.val[:-1])
    np.testing.assert_array_equal(targets, read.val[1:])


def test_the_initial_parameters_are_drawn_as_nanogpt_draws_them() -> None:
    import torch

    from benchmarks.nanogpt import draw_parameters

    torch.manual_seed(0)
    arrays = draw_parameters(RECIPE.model(65))
    assert set(arrays) > {"tokens_VD", "positions_TD", "layers/mlp/down/kernel", "final_norm/scale"}
    assert arrays["tokens_VD"].std() == pytest.approx(0.02, rel=0.1)
    assert arrays["layers/mlp/down/kernel"].std() == pytest.approx(0.02 / 2**0.5, rel=0.1)


def test_the_learning_rate_is_that_of_gpt_jax() -> None:
    from gpt_jax.train.optimizer import learning_rate_schedule

    recipe = learn.Recipe()
    schedule = learning_rate_schedule(recipe.optimizer(), recipe.steps)
    for iteration in (0, 50, 98, 99, 100, 1000, 1999):
        assert recipe.learning_rate_at(iteration) == pytest.approx(float(schedule(iteration)), rel=1e-5)
