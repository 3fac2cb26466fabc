"""The benchmark of learning runs, and its two sides learn the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.presets import Preset, small
from benchmarks.results import Results
from gpt_jax.config import OptimizerConfig
from tests.commands import TINY

pytest.importorskip("torch")

from benchmarks import learn, recipe

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.usefixtures("quick_contestants")]

ADAMW = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, beta2=0.99)
PRESET = Preset("learn", small(1, 2, 16, 16, "auto"), 4, 30, optimizer=ADAMW, schedule_steps=30)
OWN = ("configs/shakespeare_char_cpu.py", *TINY, "--train.steps=4", "--train.eval-every=2")
RECIPE = recipe.Recipe(PRESET, eval_every=20, eval_batches=2, target=1.0, own_arguments=OWN)
MACHINE = {"platform": "cpu", "versions": {}, "flags": {}}


@pytest.fixture
def text(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat", "rain", "語"], 2000)), encoding="utf-8")
    return path


@pytest.mark.exhaustive
def test_both_sides_learn_the_same(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "PYTORCH", learn.PYTORCH[:1])  # Compiled, it is the same class.
    path = tmp_path / "results" / "machine.json"
    learn.run(Results(path, MACHINE), MACHINE, 1, RECIPE, text)
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
    assert (own["seconds"], own["tokens"]) == (None, 4 * 8 * 16)

    before = path.read_bytes()
    learn.run(Results(path, MACHINE), MACHINE, 1, RECIPE, text)  # Measured already.
    assert path.read_bytes() == before


def test_without_the_commands_packages_their_contestant_is_left_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tyro.py").write_text("raise ImportError('there is no tyro')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = Results(tmp_path / "results" / "machine.json", {**MACHINE, "platform": "tpu"})
    learn.run(results, {**MACHINE, "platform": "tpu"}, 1, RECIPE, text)  # As on a TPU: without PyTorch.
    row = results.rows[learn.NAME]
    assert set(row["contestants"]) == {learn.OURS}
    assert row["failed"] == {
        learn.OWN_RECIPE: "gpt_jax prepare ended with status 1: ImportError: there is no tyro",
    }
    assert results.failed == []


def test_the_whole_validation_text_has_each_target_once(text: Path) -> None:
    read = recipe.read_text(str(text))
    assert len(read.train) == int(0.9 * len(text.read_text(encoding="utf-8")))
    batches = list(recipe.whole_val(PRESET, read))
    inputs = np.concatenate([tokens[:, :-1][mask_BT] for tokens, mask_BT in batches])
    targets = np.concatenate([tokens[:, 1:][mask_BT] for tokens, mask_BT in batches])
    np.testing.assert_array_equal(inputs, read.val[:-1])
    np.testing.assert_array_equal(targets, read.val[1:])


def test_the_initial_parameters_are_drawn_as_nanogpt_draws_them() -> None:
    import torch

    from benchmarks.nanogpt import draw_parameters

    torch.manual_seed(0)
    arrays = draw_parameters(PRESET.model)
    assert set(arrays) > {"tokens_VD", "positions_TD", "layers/mlp/down/kernel", "final_norm/scale"}
    assert arrays["tokens_VD"].std() == pytest.approx(0.02, rel=0.1)
    assert arrays["layers/mlp/down/kernel"].std() == pytest.approx(0.02 / 2**0.5, rel=0.1)


def test_the_draws_are_nanogpts(text: Path) -> None:
    """Against the order of drawing in nanoGPT's model.py and train.py, written down anew: on a CPU, without dropout."""
    import torch
    from torch import nn

    from benchmarks.nanogpt import Draws

    read = recipe.read_text(str(text))
    r = RECIPE.of(read)
    c, steps = r.preset.model, r.preset.schedule_steps

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1 = nn.LayerNorm(c.d_model, bias=False)
            self.attn = nn.ModuleDict(
                {
                    "c_attn": nn.Linear(c.d_model, 3 * c.d_model, bias=False),
                    "c_proj": nn.Linear(c.d_model, c.d_model, bias=False),
                }
            )
            self.ln_2 = nn.LayerNorm(c.d_model, bias=False)
            self.mlp = nn.ModuleDict(
                {
                    "c_fc": nn.Linear(c.d_model, 4 * c.d_model, bias=False),
                    "c_proj": nn.Linear(4 * c.d_model, c.d_model, bias=False),
                }
            )

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(read.vocab_size, c.d_model),
                    "wpe": nn.Embedding(c.context_length, c.d_model),
                    "h": nn.ModuleList([Block() for _ in range(c.n_layer)]),
                    "ln_f": nn.LayerNorm(c.d_model, bias=False),
                }
            )
            self.lm_head = nn.Linear(c.d_model, read.vocab_size, bias=False)
            self.transformer["wte"].weight = self.lm_head.weight
            self.apply(self._init_weights)
            for name, parameter in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(parameter, mean=0.0, std=0.02 / (2 * c.n_layer) ** 0.5)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def get_batch(split: str) -> np.ndarray:
        data = read.train if split == "train" else read.val
        return torch.randint(len(data) - c.context_length, (r.preset.batch_size,)).numpy()

    drawn_parameters, drawn = Draws().draw(r, str(text))

    torch.manual_seed(r.seed)
    state = GPT().state_dict()
    for ours, theirs in (
        ("tokens_VD", state["transformer.wte.weight"]),
        ("positions_TD", state["transformer.wpe.weight"]),
        ("layers/attention/out/kernel", state["transformer.h.0.attn.c_proj.weight"].T),
        ("layers/mlp/up/kernel", state["transformer.h.0.mlp.c_fc.weight"].T),
        ("layers/mlp/down/kernel", state["transformer.h.0.mlp.c_proj.weight"].T),
    ):
        np.testing.assert_array_equal(np.squeeze(drawn_parameters[ours]), theirs.numpy())
    train, train_eval, val_eval = [get_batch("train")], [], []
    for iteration in range(steps + 1):
        if iteration % r.eval_every == 0 or iteration == steps:
            train_eval.append([get_batch("train") for _ in range(r.eval_batches)])
            val_eval.append([get_batch("val") for _ in range(r.eval_batches)])
        train.append(get_batch("train"))
    np.testing.assert_array_equal(drawn["train"], train[: steps + 1])
    np.testing.assert_array_equal(drawn["train_eval"], train_eval)
    np.testing.assert_array_equal(drawn["val_eval"], val_eval)


def test_the_learning_rate_is_that_of_gpt_jax() -> None:
    from benchmarks.theirs import cosine
    from gpt_jax.train.optimizer import learning_rate_schedule

    preset = learn.RECIPE.preset
    schedule = learning_rate_schedule(preset.optimizer, preset.schedule_steps)
    for iteration in (0, 50, 98, 99, 100, 1000, 1999):
        assert cosine(preset.optimizer, preset.schedule_steps, iteration) == pytest.approx(
            float(schedule(iteration)), rel=1e-5
        )
