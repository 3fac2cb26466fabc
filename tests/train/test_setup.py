"""The data that a run is trained on are those that were meant: nothing else is prepared in place of a mistyped folder,
and a run finds its data from anywhere, and only the data that it began with."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from gpt_jax.cli.train import train_arguments
from gpt_jax.config import DataConfig, load_saved_config
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.train.setup import open_or_prepare
from tests.commands import TINY, records, refused_here, run_here

FLAGS = [
    *TINY,
    "--train.steps=2",
    "--optimizer.warmup-steps=0",
    "--optimizer.schedule=constant",
    "--parallel.devices=1",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 100)
    run_here("prepare", folder / "text.txt", "--out", folder / "mine", "--tokenizer=bytes")
    shutil.copytree(folder / "mine", folder / "data" / "web")
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    """A working folder with the data folders mine/ and data/web/, and text.txt."""
    return Path(shutil.copytree(prepared, tmp_path / "project"))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("typed", "meant"), [("mien", "mine"), ("dat/web", "data/web"), ("data/wbe/", "data/web"), ("zzzz", "")]
)
def test_a_mistyped_folder_is_not_prepared(project: Path, typed: str, meant: str) -> None:
    """quickstart's corpus would be prepared there, and trained on."""
    before = entries(project), entries(project / "data")
    error = refused_here("train", *FLAGS, "--data.dir", typed, "--out-dir=run", cwd=project)
    suggestion = f"; did you mean {meant}?" if meant else ""
    assert error == (
        f"error: there is no data folder {Path(typed)}; name it by --data.dir, or the text to prepare by --data.source"
        f"{suggestion}"
    )
    absolute = refused_here("train", *FLAGS, "--data.dir", project / typed, "--out-dir=run", cwd=project)
    assert (f"did you mean {project / meant}?" in absolute) == bool(meant)
    assert (entries(project), entries(project / "data")) == before


def test_a_folder_is_prepared_where_its_text_is_known(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the configuration's own, or came with a source."""
    monkeypatch.chdir(project)
    config = DataConfig(dir="new", source=("text.txt",), tokenizer="bytes")
    for given in ({"data.dir"}, {"data.dir", "train.steps"}):
        with pytest.raises(UserError, match=r"there is no data folder new; name it by --data\.dir, or the text"):
            open_or_prepare(config, given)
        with pytest.raises(UserError, match="there is no data folder new; name it by"):  # With init_from.
            open_or_prepare(config, given, ByteTokenizer(), "model")
    with pytest.raises(UserError, match="there is no data folder new, on which the run was trained; name it by"):
        open_or_prepare(config, resume=True)
    assert not Path("new").exists()
    for given in ({"data.dir", "data.source"}, {"data.source"}, {"train.steps"}):
        assert len(open_or_prepare(config, given).train) > 1000
        shutil.rmtree("new")
    assert len(open_or_prepare(config, {"data.source"}, resume=True).train) > 1000


def test_the_configurations_own_folder_may_be_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is prepared as it is without the flag."""
    monkeypatch.chdir(project)
    own = 'DataConfig(dir="data/own", source=("text.txt",), tokenizer="bytes")'
    Path("mine.py").write_text(f"from gpt_jax.config import Config, DataConfig\nconfig = Config(data={own})\n")
    config, _, given = train_arguments(["mine.py", "--data.dir", "data/onw"])
    with pytest.raises(UserError, match="there is no data folder data/onw; name it by"):
        open_or_prepare(config.data, given)
    for own in ("data/own", "data/own/", "./data/own", f"{project}/data/own"):
        config, _, given = train_arguments(["mine.py", "--train.steps=2", "--data.dir", own])
        assert given == {"train.steps"}
    assert len(open_or_prepare(config.data, given).train) > 1000


def test_a_run_finds_its_data_from_another_folder_and_when_both_are_moved(project: Path, tmp_path: Path) -> None:
    elsewhere, moved = tmp_path / "elsewhere", tmp_path / "moved"
    run_here("train", *FLAGS, "--data.dir=mine", "--out-dir=runs/one", cwd=project)
    saved = json.loads((project / "runs/one/config.json").read_text())
    assert (saved["data"]["dir"], saved["out_dir"]) == (str(project / "mine"), str(project / "runs/one"))

    (elsewhere / "mine").mkdir(parents=True)  # A folder of that name, which is not meant.
    out, _ = run_here("train", "--resume", "--out-dir", project / "runs/one", "--train.steps=3", cwd=elsewhere)
    assert "changed since step 2: train.steps from 2 to 3" in out
    assert "data.dir" not in out
    assert entries(elsewhere / "mine") == []
    project.rename(moved)
    run_here("train", "--resume", "--out-dir", "../moved/runs/one", "--train.steps=4", cwd=elsewhere)
    assert [record["step"] for record in records(moved / "runs/one")] == [1, 2, 3, 4]
    shutil.rmtree(moved / "mine")
    error = refused_here("train", "--resume", "--out-dir", moved / "runs/one", "--train.steps=5", cwd=elsewhere)
    assert f"there is no data folder {moved / 'mine'}, on which the run was trained; name it by --data.dir" in error


@pytest.mark.parametrize(
    ("saved", "out", "found"),
    [
        ("data/web", "runs/r", "project/data/web"),  # As older versions saved what was given.
        ("gone", "runs/r", "gone"),
        ("data/web", "/old/runs/r", "data/web"),
        ("/old/data/web", "/old/runs/r", "project/data/web"),
        ("/old/data/web", "runs/r", "/old/data/web"),
        ("", "runs/r", ""),
    ],
)
def test_the_place_of_the_data_is_found(project: Path, tmp_path: Path, saved: str, out: str, found: str) -> None:
    config = project / "runs" / "r" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"out_dir": out, "data": {"dir": saved}}))
    expected = str(tmp_path / found) if found.startswith("project") else found
    assert load_saved_config(config).data.dir == expected


OPTIONS = {"fraction": ["--val-fraction=0.3"], "order": []}


@pytest.mark.parametrize("what", OPTIONS)
def test_another_division_of_the_text_is_refused(project: Path, what: str) -> None:
    """Validation text would be trained on, in another order; evaluating would score text that was trained on."""
    rows = [json.dumps({"text": f"{i % 10} the cat sat on the mat"}) for i in range(200)]
    (project / "rows.jsonl").write_text("\n".join(rows))
    prepare = ["prepare", "rows.jsonl", "--out=mine", "--tokenizer=bytes", "--force"]
    run_here(*prepare, *OPTIONS[what], cwd=project)
    run_here("train", *FLAGS, "--data.dir=mine", "--out-dir=run", cwd=project)
    if what == "order":  # As many tokens, which are others.
        shard, meta = project / "mine" / "train-00000-of-00001.bin", project / "mine" / "meta.json"
        content = shard.read_bytes()
        shard.write_bytes(content[::-1])
        values = json.loads(meta.read_text())
        assert values["train"]["fingerprint"] == hashlib.sha256(content).hexdigest()
        values["train"]["fingerprint"] = hashlib.sha256(content[::-1]).hexdigest()
        meta.write_text(json.dumps(values))
    else:
        run_here(*prepare, cwd=project)
    before = sorted((path, path.stat().st_mtime_ns) for path in (project / "run").rglob("*"))
    error = refused_here("train", "--resume", "--out-dir=run", "--train.steps=4", cwd=project)
    assert "checkpoints/2 was trained with another division of the text than that of the data folder: the " in error
    there_and_here = "other tokens" if what == "order" else "4,000 tokens there and 4,500 here"
    assert f"the train split has {there_and_here}; prepare the data as they were" in error
    error = refused_here("eval", "--run=run", cwd=project)
    assert error.endswith(f"prepare the data as they were; --data {project / 'mine'} evaluates on them as they are")
    assert sorted((path, path.stat().st_mtime_ns) for path in (project / "run").rglob("*")) == before
    assert "loss" in run_here("eval", "--run=run", "--data=mine", cwd=project)[0]


def test_a_checkpoint_without_facts_of_the_division_is_resumed(project: Path) -> None:
    """As older versions saved it, or from a data folder that they made; the next checkpoint has what is known."""
    run_here("train", *FLAGS, "--data.dir=mine", "--out-dir=run", cwd=project)
    meta = project / "mine" / "meta.json"
    values = json.loads(meta.read_text())
    known = {name: values[name].pop("fingerprint") for name in ("train", "val")}
    for steps, saved in ((3, None), (4, known), (5, dict.fromkeys(known, ""))):
        facts = project / "run" / "checkpoints" / str(steps - 1) / "meta" / "metadata"
        before = json.loads(facts.read_text())
        if saved is None:
            del before["splits"]
        else:
            assert {name: split["fingerprint"] for name, split in before["splits"].items()} == saved
        facts.write_text(json.dumps(before))
        run_here("train", "--resume", "--out-dir=run", f"--train.steps={steps}", cwd=project)
        meta.write_text(json.dumps(values))  # From now on without.


def test_a_resume_that_trains_nothing_leaves_the_run_as_it_is(project: Path) -> None:
    run_here("train", *FLAGS, "--data.dir=mine", "--out-dir=run", cwd=project)
    before = (project / "run" / "config.json").read_bytes()
    out, _ = run_here("train", "--resume", "--out-dir=run", "--train.steps=1", cwd=project)
    assert "run has already been trained for 2 steps; raise train.steps to go on" in out
    assert (project / "run" / "config.json").read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_prepared(project: Path) -> None:
    (project / "file").write_text("")
    new = ["--data.dir=new", "--data.source=text.txt"]
    for out, message in (
        ("file/run", "the run's folder file/run cannot be written: "),
        (os.fsdecode(b"caf\xe9"), r"/project/caf\udce9' is not UTF-8, which names of checkpoints must be; choose"),
    ):
        assert message in refused_here("train", *FLAGS, *new, "--out-dir", out, cwd=project)
    assert not (project / "new").exists()


def test_data_whose_name_is_not_utf8_are_trained_on(project: Path) -> None:
    """The name comes back from the run's configuration."""
    name = os.fsdecode(b"caf\xe9")
    (project / f"{name}.txt").write_text("the cat sat on the mat. " * 100)
    run_here("prepare", f"{name}.txt", "--out", name, "--tokenizer=bytes", cwd=project)
    assert json.loads((project / name / "meta.json").read_text())["settings"]["source"] == [f"{name}.txt"]
    run_here("train", *FLAGS, "--data.dir", name, "--out-dir=run", cwd=project)
    run_here("train", "--resume", "--out-dir=run", "--train.steps=3", cwd=project)
    assert [record["step"] for record in records(project / "run")] == [1, 2, 3]
