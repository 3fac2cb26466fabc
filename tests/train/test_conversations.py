"""Training on conversations and on mixtures: what is logged, resuming, several hosts' devices, evaluating, chatting."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.tokenizer.chat_template import TEMPLATE
from tests import tiny
from tests.commands import TINY, records, refused_here, run_here

FLAGS = [*TINY, "--model.context-length=32", "--train.seed=5", "--train.eval-every=4", "--parallel.devices=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and with conversations none of which is longer than a window."""
    root = tmp_path_factory.mktemp("data")
    tiny.byte_data(root)
    rng = np.random.default_rng(0)
    rows = [{"prompt": "why?" * (1 + i % 2), "completion": "ab" * rng.integers(1, 8)} for i in range(60)]
    (root / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_here("prepare", root / "chat.jsonl", "--out", root / "chat", "--tokenizer", "bytes")
    return root


def mixture(data: Path) -> list[str]:
    return ["--data.mixture", f"{data / 'prepared'}=2", f"{data / 'chat'}=1", "--data.curriculum", "6:0,1"]


def logged(out: Path) -> list[dict[str, object]]:
    """All that is logged, but for how long it took."""
    times = ("tokens_per_second", "step_ms", "mfu")
    return [{name: value for name, value in record.items() if name not in times} for record in records(out)]


def test_a_mixture_is_logged_by_folder_and_resumed_exactly(data: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, *mixture(data), "--model.dropout=0.1", "--optimizer.schedule=constant"]
    run_here("train", *flags, "--train.steps=12", f"--out-dir={tmp_path / 'whole'}")
    run_here("train", *flags, "--train.steps=5", f"--out-dir={tmp_path / 'parts'}")
    run_here("train", "--resume", "--train.steps=12", f"--out-dir={tmp_path / 'parts'}")
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert [record for record in parts if record["step"] != 5] == [r for r in whole if r["step"] != 5]
    last = whole[-1]
    by_folder = {name: last[f"val_loss/{name}"] for name in ("prepared", "chat")}
    assert last["val_loss"] == pytest.approx(np.average(list(by_folder.values()), weights=[2, 1]))
    assert last["epoch/prepared"] == whole[5]["epoch/prepared"]  # Its weight is 0 from the sixth step on.
    assert last["epoch/chat"] > whole[5]["epoch/chat"]  # type: ignore[operator]


@pytest.mark.slow
def test_devices_do_not_matter(data: Path, tmp_path: Path) -> None:
    """The losses on one device and on four, by pmap and on a mesh, to rounding."""
    runs = {"one": [], "four": ["--parallel.devices=4"], "mesh": ["--parallel.devices=4", "--parallel.fsdp=4"]}
    losses = []
    for name, flags in runs.items():
        out = tmp_path / name
        run_here("train", *FLAGS, *mixture(data), "--train.steps=4", f"--out-dir={out}", *flags)
        losses.append([record["loss"] for record in records(out)] + [records(out)[-1]["val_loss"]])
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=2e-5)


def test_eval_gives_the_loss_of_training(data: Path, tmp_path: Path) -> None:
    """Of what is to be learnt, each conversation on its own; and the folder of a mixture must be named."""
    out = tmp_path / "run"
    run_here("train", *FLAGS, f"--data.dir={data / 'chat'}", "--train.steps=4", f"--out-dir={out}")
    report = json.loads(run_here("eval", "--run", out, "--json")[0])
    last = records(out)[-1]
    assert report["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    run_here("train", *FLAGS, *mixture(data), "--train.steps=4", f"--out-dir={tmp_path / 'mixed'}")
    error = refused_here("eval", "--run", tmp_path / "mixed")
    assert "was trained on several folders; name one by --data: " in error
    report = json.loads(run_here("eval", "--run", tmp_path / "mixed", "--data", data / "chat", "--json")[0])
    assert report["loss"] == pytest.approx(records(tmp_path / "mixed")[-1]["val_loss/chat"], rel=1e-5)


@pytest.mark.slow
def test_what_was_trained_on_conversations_chats(data: Path, tmp_path: Path) -> None:
    """The template is saved with the run, used by --chat and by messages, and exported."""
    out = tmp_path / "run"
    run_here("train", *FLAGS, f"--data.dir={data / 'chat'}", "--train.steps=60", f"--out-dir={out}")
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "why?"}]}))
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 8, "--temperature", 0]
    first = json.loads(run_here("sample", "--run", out, *flags)[0])
    assert {*first["text"]} <= {*"ab"}
    run_here("export", "--run", out, "--out", tmp_path / "exported")
    second = json.loads(run_here("sample", "--model", tmp_path / "exported", *flags, "--context-length", 32)[0])
    assert second["text"] == first["text"]
    # Before that, there is none.
    run_here("train", *FLAGS, f"--data.dir={data / 'prepared'}", "--train.steps=3", f"--out-dir={tmp_path / 'base'}")
    assert "has no chat template" in refused_here("sample", "--run", tmp_path / "base", *flags)
    # A base model that goes on with conversations has one.
    base = ["--init-from", tmp_path / "base", "--model.context-length=32", "--optimizer.warmup-steps=2"]
    run_here("train", *base, f"--data.dir={data / 'chat'}", "--train.steps=3", f"--out-dir={tmp_path / 'tuned'}")
    assert json.loads(run_here("sample", "--run", tmp_path / "tuned", *flags)[0])["text"] is not None


def test_another_mixture_is_another_order(data: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--train.steps=4", f"--out-dir={tmp_path / 'run'}"]
    run_here("train", *flags, *mixture(data))
    more = ["--resume", "--train.steps=5", f"--out-dir={tmp_path / 'run'}"]
    other = ["--data.mixture", f"{data / 'prepared'}=1", f"{data / 'chat'}=1"]
    assert "data.mixture is " in (error := refused_here("train", *more, *other))
    assert "another order of the data" in error
    moved = tmp_path / "moved"
    (data / "chat").rename(moved)
    try:
        there = ["--data.mixture", f"{data / 'prepared'}=2", f"{moved}=1"]
        run_here("train", *more, *there)
    finally:
        moved.rename(data / "chat")
    assert len(records(tmp_path / "run")) == 5
