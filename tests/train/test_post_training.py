"""Tuning by answers, by preferences and by rewards, from end to end: killed, stopped, on other devices, refused."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_jax.data.batch import Batch
from gpt_jax.environments.arithmetic import Arithmetic
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.train.tasks.rewards import RewardTask, batch_sizes
from tests.cases import EXHAUSTIVE, cases
from tests.commands import TINY, records, refused_here, run, run_here
from tests.train.killed import train_killed

STEPS = 40
TIMES = ("step_ms", "tokens_per_second", "mfu", "rollout_ms", "judging_ms")
ENVIRONMENT = '''
import time
from pathlib import Path
from gpt_jax.environments.environment import Made, Problem

class Letters:
    """An answer is worth its share of the letter a."""
    def __init__(self, fails="", at=10**9):
        self.fails, self.at = fails, at
    def problems(self, split):
        return Made(50 if split == "train" else 5, lambda i: Problem(chr(97 + i % 26), {"i": i}))
    def reward(self, problem, answer):
        if problem.fields["i"] == self.at and not Path(__file__).with_name("mended").exists():
            if self.fails == "raises":
                raise ValueError("no such letter")
            if self.fails == "hangs":
                time.sleep(1000)
            if self.fails == "nan":
                return float("nan")
        return 0.0 if self.fails == "always" else answer.count("a") / max(len(answer), 1)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base run, conversations, preferences, problems, and an environment of the user's."""
    place = tmp_path_factory.mktemp("post")
    rng = random.Random(0)
    words = ["ab", "ba", "cab", "bad", "dab"]

    def write(name: str, rows: list[Any]) -> Path:
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place / name

    (place / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=6)) for _ in range(300)))
    pairs = [{"prompt": rng.choice(words), "chosen": "a" * n, "rejected": "b" * (4 - n)} for n in (1, 2, 3) * 30]
    chats = [{"prompt": rng.choice(words), "completion": rng.choice(words)} for _ in range(90)]
    asked = [{"prompt": rng.choice(words), "answer": rng.choice("ab")} for _ in range(90)]
    for name, rows, kind in (
        ("pairs", pairs, "preference"),
        ("chats", chats, "completion"),
        ("asked", asked, "problem"),
    ):
        source = write(f"{name}.jsonl", rows)
        run_here("prepare", source, "--out", place / name, "--tokenizer=bytes", f"--format={kind}")
    run_here("prepare", place / "text.txt", "--out", place / "text", "--tokenizer=bytes")
    (place / "letters.py").write_text(ENVIRONMENT)
    (place / "tune.py").write_text("from gpt_jax.config import Config\n\nconfig = Config()\n")
    base = [
        "--data.packing=documents",
        f"--data.dir={place / 'chats'}",
        "--train.steps=30",
        f"--out-dir={place / 'base'}",
    ]
    run_here("train", *TINY, "--model.context-length=32", "--model.no-bias", *base)
    return place


def arguments(place: Path, objective: str) -> list[object]:
    """The flags of a run that tunes the base run."""
    common = [
        place / "tune.py",
        f"--init-from={place / 'base'}",
        f"--train.steps={STEPS}",
        "--train.log-every=1",
        "--train.eval-every=20",
        "--train.checkpoint-every=4",
        "--optimizer.warmup-steps=0",
        "--parallel.devices=2",
    ]
    return (
        common
        + {
            "sft": [f"--data.dir={place / 'chats'}", "--data.batch-size=4"],
            "dpo": ["--objective.name=dpo", f"--data.dir={place / 'pairs'}", "--data.batch-size=4"],
            "grpo": [
                "--objective.name=grpo",
                f"--objective.grpo.environment={place / 'letters.py'}:Letters",
                "--data.batch-size=4",
                "--objective.grpo.group-size=3",
                "--objective.grpo.max-prompt-tokens=4",
                "--objective.grpo.max-new-tokens=8",
                "--objective.grpo.overlong=keep",
                "--objective.grpo.iterations=2",
                "--objective.grpo.kl-beta=0.01",
                "--objective.grpo.judges=1",
            ],
        }[objective]
    )


def logged(out: Path) -> list[dict[str, Any]]:
    """All that is logged, but for how long it took."""
    return [{name: value for name, value in r.items() if name not in TIMES} for r in records(out)]


def checksums(out: Path) -> Any:
    """Those of the parameters and of the optimizer's state after the last step."""
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(STEPS)["checksums"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_commands")
@pytest.mark.parametrize("kills", cases([4, 10], [4]))
@pytest.mark.parametrize("objective", cases(["sft", "dpo", "grpo"], ["dpo", "grpo"]))
def test_killed_and_resumed_is_bit_for_bit_the_same(place: Path, tmp_path: Path, objective: str, kills: int) -> None:
    """In a rollout, too, which takes most of the time of a step for rewards."""
    run("train", *arguments(place, objective), f"--out-dir={tmp_path / 'whole'}")
    for out in train_killed(tmp_path, arguments(place, objective), 10, kills=kills):
        assert logged(out) == logged(tmp_path / "whole")
        assert len(logged(out)) == STEPS
        assert checksums(out) == checksums(tmp_path / "whole")


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_stopped_run_goes_on_and_devices_do_not_matter(place: Path, tmp_path: Path, objective: str) -> None:
    """Stopped by its own length; with one device, two, and a mesh: every number within 1e-5."""
    flags = arguments(place, objective)
    run_here("train", *flags, f"--out-dir={tmp_path / 'whole'}", "--train.steps=8", "--optimizer.schedule=constant")
    expected = logged(tmp_path / "whole")
    assert len(expected) == 8
    if objective == "grpo":  # On policy, ratios of two programs are 1 to rounding; the second step on a batch moves.
        assert expected[0]["clipped"] == 0
        assert abs(expected[0]["loss"]) < 1e-5
        assert [r["reward"] for r in expected[::2]] == [r["reward"] for r in expected[1::2]]
    steps = ["--train.steps=4", "--optimizer.schedule=constant"]
    run_here("train", *flags, f"--out-dir={tmp_path / 'parts'}", *steps)
    run_here("train", "--resume", f"--out-dir={tmp_path / 'parts'}", "--train.steps=8")
    assert logged(tmp_path / "parts")[4:] == expected[4:]
    for name, more in (("one", ["--parallel.devices=1"]), ("mesh", ["--parallel.devices=4", "--parallel.fsdp=4"])):
        run_here("train", *flags, f"--out-dir={tmp_path / name}", *steps, *more)
        for ours, theirs in zip(logged(tmp_path / name)[:3], expected[:3], strict=True):
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        pytest.param("dpo", ["--parallel.devices=1"], marks=EXHAUSTIVE),
        pytest.param("dpo", ["--objective.dpo.reference=model"], marks=EXHAUSTIVE),
        ("dpo", ["--model.lora.rank=2", "--objective.dpo.reference=model"]),
        pytest.param("grpo", ["--parallel.devices=1"], marks=EXHAUSTIVE),
        ("grpo", ["--objective.grpo.iterations=1", "--objective.grpo.top-k=20", "--objective.grpo.top-p=0.9"]),
        pytest.param("grpo", ["--model.lora.rank=2", "--objective.grpo.temperature=0.8"], marks=EXHAUSTIVE),
    ],
)
def test_microbatches_do_not_matter(place: Path, tmp_path: Path, objective: str, more: list[str]) -> None:
    """Nor, with adapters, filters or references: what the sampler says to a token, training says, too."""
    flags = [*arguments(place, objective), "--train.steps=4", "--data.batch-size=8", *more]
    for name, size in (("whole", 0), ("parts", 2)):
        run_here("train", *flags, f"--data.microbatch-size={size}", f"--out-dir={tmp_path / name}")
    for ours, theirs in zip(logged(tmp_path / "parts"), logged(tmp_path / "whole"), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5, atol=1e-5)
        assert ours.get("sampler_difference", 0) < 1e-4


@pytest.mark.parametrize("loss", cases(["dapo", "dr_grpo"], ["dapo"]))
def test_groups_that_do_not_count_need_not_be_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Most answers of two tokens are worth nothing, so that a quarter of the groups is enough in some steps."""
    computed = []
    flags = [*arguments(place, "grpo"), "--data.batch-size=16", "--objective.grpo.max-new-tokens=2", "--train.steps=10"]
    flags += [f"--objective.grpo.loss={loss}", "--objective.grpo.scale=none"]

    def batch(task: RewardTask, rows: Any) -> Batch:
        computed.append(len(rows))
        return whole(task, rows)

    whole = RewardTask.batch
    monkeypatch.setattr(RewardTask, "batch", batch)
    run_here("train", *flags, f"--out-dir={tmp_path / 'few'}")
    assert min(computed) < 16
    monkeypatch.setattr("gpt_jax.train.tasks.rewards.batch_sizes", lambda size, n_shares, n_micro: {size: 1})
    run_here("train", *flags, f"--out-dir={tmp_path / 'all'}")
    assert computed[-1] == 16
    for ours, theirs in zip(logged(tmp_path / "few"), logged(tmp_path / "all"), strict=True):
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5, atol=1e-5)


def test_answers_may_fill_a_context_of_any_length(place: Path, tmp_path: Path) -> None:
    """Learned positions end there, and rows of answers do, too."""
    flags = [*arguments(place, "grpo"), "--train.steps=2", "--parallel.devices=1", "--model.context-length=21"]
    run_here("train", *flags, "--objective.grpo.max-new-tokens=18", f"--out-dir={tmp_path / 'run'}")
    assert records(tmp_path / "run")[0]["overlong"] > 0


def test_the_sizes_of_batches() -> None:
    assert batch_sizes(16, 2, 1) == {4: 1, 8: 1, 16: 1}
    assert batch_sizes(16, 8, 1) == {8: 1, 16: 1}
    assert batch_sizes(16, 1, 16) == {4: 4, 8: 8, 16: 16}
    assert batch_sizes(16, 2, 2) == {4: 1, 8: 1, 16: 2}
    assert batch_sizes(6, 2, 1) == {6: 1}
    assert batch_sizes(1, 1, 1) == {1: 1}


def test_preferences_are_learnt(place: Path, tmp_path: Path) -> None:
    """The first loss is ln 2, all variants lower it, and adapters, full tuning and both references agree at first."""
    flags = [*arguments(place, "dpo"), "--parallel.devices=1", "--train.steps=20", "--optimizer.learning-rate=1e-2"]
    lora = [
        "--model.lora.rank=2",
        "--objective.dpo.reference=model",
        "--optimizer.learning-rate=2e-2",
        "--train.steps=40",
    ]
    for name, more in {
        "file": [],
        "model": ["--objective.dpo.reference=model"],
        "lora": lora,
        "ipo": ["--objective.dpo.loss=ipo"],
    }.items():
        run_here("train", *flags, *more, f"--out-dir={tmp_path / name}")
        first, last = records(tmp_path / name)[0], records(tmp_path / name)[-1]
        if name != "ipo":
            assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert last["val_loss"] < first["loss"]
        assert last["margin"] > 0
        assert last["val_accuracy"] > (0.6 if name == "lora" else 0.8)  # Two columns learn more slowly.
    file, model = (records(tmp_path / name) for name in ("file", "model"))
    for ours, theirs in zip(file, model, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert len(list((place / "pairs").glob("*-reference-*"))) >= 2


def test_a_reference_file_belongs_to_its_weights(place: Path, tmp_path: Path) -> None:
    """It is read again by the next run, and made anew where it is damaged, or the weights are others."""
    pairs = tmp_path / "pairs"
    run_here("prepare", place / "pairs.jsonl", "--out", pairs, "--tokenizer=bytes", "--format=preference")
    flags = [*arguments(place, "dpo"), f"--data.dir={pairs}", "--parallel.devices=1", "--train.steps=1"]
    run_here("train", *flags, f"--out-dir={tmp_path / 'one'}")
    files = {path: path.read_bytes() for path in pairs.glob("*-reference-*")}
    path, content = next(iter(files.items()))
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    run_here("train", *flags, f"--out-dir={tmp_path / 'two'}")
    assert path.read_bytes() == content
    run_here("train", *flags, f"--init-from={tmp_path / 'one'}", f"--out-dir={tmp_path / 'three'}")
    assert len(list(pairs.glob("*-reference-*"))) == len(files) + 2
    assert records(tmp_path / "three")[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_rewards_are_learnt(place: Path, tmp_path: Path) -> None:
    """On policy: the ratio is 1, nothing is clipped, and what is trained says what the sampler said."""
    flags = [*arguments(place, "grpo"), "--parallel.devices=1", "--objective.grpo.iterations=1"]
    run_here("train", *flags, "--optimizer.learning-rate=2e-2", f"--out-dir={tmp_path / 'run'}")
    found = records(tmp_path / "run")
    assert np.mean([r["reward"] for r in found[-5:]]) > np.mean([r["reward"] for r in found[:5]]) + 0.2
    assert all(r["clipped"] == 0 for r in found)
    assert max(r["sampler_difference"] for r in found) < 1e-4
    assert found[-1]["val_loss"] == pytest.approx(1 - found[-1]["val_reward"])
    out, _ = run_here("sample", "--run", tmp_path / "run", "--prompt", "c", "--max-new-tokens", 8)
    assert out


def test_a_problem_set_and_arithmetic(place: Path, tmp_path: Path) -> None:
    """The environments that come with the project, for a few steps; the samples show a problem and its reward."""
    flags = [*arguments(place, "grpo"), "--train.steps=2", "--parallel.devices=1"]
    more = ["--objective.grpo.environment=problems", f"--data.dir={place / 'asked'}", "--objective.grpo.stop", "\n"]
    long = ["--objective.grpo.max-prompt-tokens=24", "--objective.grpo.max-new-tokens=8"]
    run_here("train", *flags, *more, *long, f"--out-dir={tmp_path / 'asked'}")
    assert {"reward", "without_spread", "overlong", "too_long"} <= records(tmp_path / "asked")[0].keys()
    options = ["--objective.grpo.environment=arithmetic", "--objective.grpo.options", "digits=1"]
    out, _ = run_here("train", *flags, *options, "--train.sample-every=2", f"--out-dir={tmp_path / 'sums'}")
    assert f"{Arithmetic(digits=1).problems('val')[1].prompt}" in out
    assert "--- reward 0" in out


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("raises", "raised ValueError: no such letter (letters.py, line "),
        ("nan", "returned nan, which is no number from 0 to 1"),
        ("hangs", "did not return within 2 s"),
    ],
)
def test_an_environment_that_fails_is_told_and_the_run_saved(
    place: Path, tmp_path: Path, fails: str, message: str
) -> None:
    (tmp_path / "letters.py").write_text(ENVIRONMENT)
    flags = [*arguments(place, "grpo"), "--parallel.devices=1", "--objective.grpo.judge-timeout=2"]
    flags += [f"--objective.grpo.environment={tmp_path / 'letters.py'}:Letters"]
    flags += ["--train.checkpoint-every=40", "--objective.grpo.kl-beta=0"]
    options = ["--objective.grpo.options", f"fails={fails}", "at=3"]
    _, err = run_here("train", *flags, *options, f"--out-dir={tmp_path / 'run'}", status=1)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "problem 3 of train: " in line
    assert message in line
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        saved = checkpoints.steps()
    assert saved == [8]  # The third problem is one of the fifth batch, after eight steps.
    (tmp_path / "mended").touch()
    more = "--train.steps=10"
    run_here("train", "--auto-resume", *flags, *options, more, f"--out-dir={tmp_path / 'run'}")


def test_equal_rewards_are_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_jax.train.tasks.rewards.STEPS_TO_WARN", 2)
    flags = [*arguments(place, "grpo"), "--train.steps=6", "--objective.grpo.options", "fails=always"]
    _, err = run_here("train", *flags, f"--out-dir={tmp_path / 'run'}")
    assert "all rewards of the first 2 steps are 0, from which nothing is learnt" in err
    assert {r["grad_norm"] for r in records(tmp_path / "run")} == {0.0}


def test_answers_to_held_out_conversations_are_shown(place: Path, tmp_path: Path) -> None:
    flags = [*arguments(place, "sft"), "--train.steps=2", "--train.sample-every=2", "--train.sample-tokens=4"]
    out, _ = run_here("train", *flags, f"--out-dir={tmp_path / 'run'}")
    assert out.count("<|user|>") == 3


@pytest.mark.parametrize(
    ("objective", "flags", "message"),
    [
        ("dpo", ["--data.dir={place}/text"], "is a text set; its objective is next_token, and dpo needs preference"),
        ("dpo", ["--init-from="], "objective.name = 'dpo' is not possible: it must be next_token without init_from"),
        ("dpo", ["--model.context-length=3"], "fits into model.context_length + 1 = 4 tokens; use a longer context"),
        ("dpo", ["--data.mixture", "{place}/pairs=1"], "it must be empty with dpo, which takes one folder"),
        ("dpo", ["--objective.dpo.beta=0"], "objective.dpo.beta = 0.0 is not possible: it must be more than 0"),
        ("dpo", ["--train.sample-prompt=a"], "it must be empty with dpo, whose samples answer what is held out"),
        (
            "grpo",
            ["--train.eval-batch-size=4"],
            "it must be 0 with grpo, whose answers are drawn in",
        ),
        ("grpo", ["--objective.grpo.environment="], "it must be what gives problems and rewards: arithmetic, "),
        ("grpo", ["--objective.grpo.group-size=1"], "it must be 2 or more: answers are compared"),
        (
            "grpo",
            ["--objective.grpo.max-new-tokens=64"],
            "max_new_tokens = 68 are more than model.context_length + 1 = 33",
        ),
        ("grpo", ["--train.eval-every=5"], "it must be a multiple of objective.grpo.iterations = 2"),
        ("grpo", ["--objective.grpo.environment=nothing"], "there is no environment 'nothing'"),
        ("grpo", ["--objective.grpo.environment=problems"], "it must be a folder made by gpt-jax prepare"),
        ("grpo", ["--model.lora.rank=1", "--model.lora.dropout=0.1"], "answers are drawn without it"),
        (
            "grpo",
            ["--parallel.tensor=2", "--objective.grpo.top-k=3"],
            "need all logits of a token",
        ),
        ("grpo", ["--data.mixture", "{place}/asked=1"], "it must be empty with grpo, whose data are problems"),
        ("sft", ["--objective.grpo.environment=arithmetic"], "it must be empty without --objective.name grpo"),
        ("sft", ["--data.dir={place}/pairs"], "is a preference set; its objective is dpo, and next_token needs"),
    ],
)
def test_what_is_refused(place: Path, tmp_path: Path, objective: str, flags: list[str], message: str) -> None:
    given = [flag.format(place=place) for flag in flags]
    assert message in refused_here("train", *arguments(place, objective), *given, f"--out-dir={tmp_path / 'run'}")


def test_a_prompt_that_is_too_long_is_told(place: Path, tmp_path: Path) -> None:
    """A group that has one is left out; where all have, the run ends."""
    flags = [*arguments(place, "grpo"), "--train.steps=2", "--objective.grpo.environment=problems"]
    error = refused_here("train", *flags, f"--data.dir={place / 'asked'}", f"--out-dir={tmp_path / 'run'}")
    assert "has a prompt of " in error
    assert "objective.grpo.max_prompt_tokens = 4 or less; raise it" in error


def test_another_tokenizer_than_the_references_is_refused(place: Path, tmp_path: Path) -> None:
    run_here("prepare", place / "pairs.jsonl", "--out", tmp_path / "pairs", "--format=preference", "--vocab-size=270")
    error = refused_here(
        "train", *arguments(place, "dpo"), f"--data.dir={tmp_path / 'pairs'}", f"--out-dir={tmp_path}/run"
    )
    assert "was not prepared with the tokenizer of the model in init_from" in error


def test_answers_differ_from_step_to_step(place: Path, tmp_path: Path) -> None:
    """Where nothing is learnt, the same problem gets other answers each time, and another seed gives others."""
    flags = [*arguments(place, "grpo"), "--train.steps=2", "--objective.grpo.iterations=1", "--parallel.devices=1"]
    flags += ["--data.batch-size=50", "--objective.grpo.kl-beta=0", "--optimizer.learning-rate=1e-30"]
    found = []
    for seed in (0, 1):
        run_here("train", *flags, f"--train.seed={seed}", f"--out-dir={tmp_path / str(seed)}")
        found += [record["entropy"] for record in records(tmp_path / str(seed))]
    assert len(set(found)) == 4


def test_other_epochs_have_the_same_problems(place: Path, tmp_path: Path) -> None:
    flags = [*arguments(place, "grpo"), "--train.steps=4", "--parallel.devices=1"]
    run_here("train", *flags, f"--out-dir={tmp_path / 'run'}")
    assert [r["epoch"] for r in records(tmp_path / "run")] == [4 / 50, 4 / 50, 8 / 50, 8 / 50]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def problems(self, split): raise ValueError('no data')", "raised ValueError: no data (odd.py, line "),
        ("def problems(self, split): return [Problem(3, {})] * 9", "problem 0 of train: the environment "),
        ("def problems(self, split): return []", "has no problem in train"),
    ],
)
def test_environments_without_problems(place: Path, tmp_path: Path, body: str, message: str) -> None:
    head = (
        "from gpt_jax.environments.environment import Problem\nclass Odd:\n    def reward(self, *_): return 0.0\n    "
    )
    (tmp_path / "odd.py").write_text(head + body)
    flags = [*arguments(place, "grpo"), f"--objective.grpo.environment={tmp_path / 'odd.py'}:Odd"]
    assert message in refused_here("train", *flags, f"--out-dir={tmp_path / 'run'}")


def test_what_decides_the_order_of_problems_stays(place: Path, tmp_path: Path) -> None:
    """Other settings may change, each by its own name."""
    flags = [*arguments(place, "grpo"), f"--out-dir={tmp_path / 'run'}"]
    run_here("train", *flags, "--train.steps=4")
    more = ["--resume", f"--out-dir={tmp_path / 'run'}", "--train.steps=6"]
    assert "objective.grpo.iterations is 2 in checkpoint" in refused_here(
        "train", *more, "--objective.grpo.iterations=1"
    )
    out, _ = run_here("train", *more, "--objective.grpo.clip-high=0.3")
    assert "changed since step 4: objective.grpo.clip_high from 0.2 to 0.3" in out
