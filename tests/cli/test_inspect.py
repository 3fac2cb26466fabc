"""`inspect`: what a folder or a run holds, and exactly the windows that training sees."""

import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.cli.inspect import InspectArgs, settings
from gpt_jax.cli.report import Bar, Bars, Passage, Table, to_page, to_text
from gpt_jax.data.batch import Batch
from gpt_jax.data.folders import together
from gpt_jax.data.loader import MixedBatches, stack
from gpt_jax.data.marked import Run
from gpt_jax.data.shards import load_meta, open_dataset
from gpt_jax.data.windows import windows
from gpt_jax.storage.remote import location
from tests.commands import TINY, records, refused_here, run_here

MIXTURE = ["--data.curriculum", "2:0.2,0.8", "--train.seed=3", "--train.steps=4", "--train.eval-every=4"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of conversations, of 20 to 200 tokens."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("chat")
    with (folder / "chat.jsonl").open("w") as f:
        for i in range(60):
            turns = [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": "<b> words " * rng.randint(1, 8)},
            ]
            f.write(json.dumps({"messages": turns * rng.randint(1, 2)}) + "\n")
        f.write(json.dumps({"messages": [{"role": "user", "content": "alone"}]}) + "\n")
    run_here("prepare", folder / "chat.jsonl", "--out", folder / "data", "--tokenizer=bytes")
    return folder / "data"


@pytest.fixture(scope="module")
def mixed(chat: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Batch]]:
    """A run on packed conversations and on a stream of texts, and the batches that it was trained on."""
    out, seen, batches = tmp_path_factory.mktemp("runs") / "mixed", dict[int, Batch](), MixedBatches.__call__

    def noted(self: MixedBatches, step: int, rows: np.ndarray | None = None) -> Batch:
        seen[step] = batches(self, step, rows)
        return seen[step]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedBatches, "__call__", noted)
        mixture = ("--data.mixture", f"{chat}=0.5", f"{tiny_data}=0.5")
        run_here("train", *TINY, *mixture, *MIXTURE, "--model.context-length=64", f"--out-dir={out}")
    return out, seen


def test_the_first_step_is_that_of_the_metrics(mixed: tuple[Path, dict[int, Batch]]) -> None:
    """Step N of `inspect` is what the run was trained on for record N, and so is what DataFolders gives."""
    run, seen = mixed
    config, of_run = settings(InspectArgs(str(run), step=1))
    assert of_run
    folders = together([open_dataset(location(folder)) for folder in config.data.folders], config.data)
    batches = folders.batches(config.model.context_length, config.train.seed)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        found = windows(batches, step)
        shown = stack([window.row for window in found], masked=True, packed=True)
        for ours, trained in zip(shown, seen[step - 1], strict=True):
            assert np.array_equal(ours, trained)
        assert {window.folder for window in found} == {"data", "prepared"}


def test_the_windows_of_a_run_are_printed(mixed: tuple[Path, dict[int, Batch]]) -> None:
    run, seen = mixed
    out, _ = run_here("inspect", run, "--step=2", "--rows=8")
    n_targets = int(seen[1].mask.sum())
    assert out.startswith(f"step 2 of {run}\n  windows  8 of 64 tokens and one more, by seed 3; {n_targets} targets\n")
    titles = re.findall(r"^window (\d) of 8, from (data|prepared): (\d+) targets$", out, re.MULTILINE)
    assert [int(n) for n, _, _ in titles] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [int(n) for _, _, n in titles] == seen[1].mask.sum(axis=1).tolist()
    texts = re.split(r"^window .*\n", out, flags=re.MULTILINE)[1:]
    for text, mask, (_, folder, _) in zip(texts, seen[1].mask, titles, strict=True):
        marked = "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL)).replace("<|end|>", "\1")
        assert len(marked) == (mask.sum() if folder == "data" else 0)
        assert ("<|user|>question" in text) == (folder == "data")
    assert re.search(r"── document \d+, tokens [\d,]+ to [\d,]+ of [\d,]+ ──", out)
    assert re.search(r"── \d+ tokens? of padding ──", out)
    out, _ = run_here("inspect", run, "--step=9", "--rows=1")
    assert "  left out  7 windows; --rows 8 shows all\n" in out
    assert "  note      the run ends at step 4; a longer one would see this\n" in out
    assert out.count("\nwindow ") == 1


def test_flags_replace_settings(mixed: tuple[Path, dict[int, Batch]], chat: Path) -> None:
    run, _ = mixed
    config, _ = settings(InspectArgs(str(run), context_length=32, batch_size=2, seed=0, packing="stream"))
    assert (config.model.context_length, config.data.batch_size, config.train.seed) == (32, 2, 0)
    assert (config.data.packing, config.data.curriculum) == ("stream", ("2:0.2,0.8",))
    config, of_run = settings(InspectArgs(str(chat)))
    assert not of_run
    assert (config.model.context_length, config.data.batch_size, config.train.seed) == (1024, 32, 0)
    config, _ = settings(InspectArgs(mixture=("a=1", "b=2"), curriculum=("5:1,1",)))
    assert config.data.folders == ("a", "b")
    assert config.data.stages() == [(0, (1, 2)), (5, (1, 1))]


def test_a_folder_is_told(chat: Path) -> None:
    before = sorted(path.name for path in chat.iterdir())
    out, _ = run_here("inspect", chat, "--context-length=100")
    assert sorted(path.name for path in chat.iterdir()) == before
    assert out.startswith(f"{chat}\n  format ")
    for line in (
        r"  left out: no answer to learn  1 record",
        r"  lengths \(training\) +shortest \d+, 10% \d+, median \d+, 90% \d+, 99% \d+, longest \d+, mean [\d.]+",
        r" +32 to 63 +\d+  █+.?",
        r" +<\|end\|>  260 +\d+ +[\d.]+%  █*.?",
        r"of those to be learnt",
        r"  training takes +documents",
        r"  stream +\d+ windows an epoch, all full",
        r"  documents +\d+ windows an epoch, [\d.]+% full; in the order of the documents, by next-fit, [\d.]+%",
        r"    longer than one +\d+ of \d+ documents, cut after a turn",
        r"    dropped +0 of \d+ documents, whose first answer to learn does not fit; \d+ tokens are in no window",
    ):
        assert re.search(f"^{line}$", out, re.MULTILINE), line


def test_a_run_is_told_folder_by_folder(mixed: tuple[Path, dict[int, Batch]], chat: Path, tiny_data: Path) -> None:
    out, _ = run_here("inspect", mixed[0], "--split=val")
    assert "  weight of data      0.5, 0.2 after step 2; 0." in out
    assert [line for line in out.splitlines() if line in map(str, (chat, tiny_data))] == [str(chat), str(tiny_data)]
    assert out.count("validation documents in windows of 64 tokens and one more") == 2


def test_a_page_holds_the_same(mixed: tuple[Path, dict[int, Batch]], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    for args in (["--step=2"], []):
        assert run_here("inspect", mixed[0], *args, f"--html={file}")[0] == f"written to {file}\n"
        text, _ = run_here("inspect", mixed[0], *args)
        page = file.read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img|iframe)|https?:|@import|url\(", page)
        assert "&lt;b&gt; words" in page or not args
        shown = re.sub(r"<style>.*</style>|<[^>]*>", "", page, flags=re.DOTALL)
        for name in re.findall(r"^window .*$", text, re.MULTILINE):
            assert name in shown
    assert "could not be written (No such file or directory)" in refused_here("inspect", mixed[0], "--html=nowhere/x")
    assert "could not be written (Is a directory)" in refused_here("inspect", mixed[0], f"--html={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_jax.cli.inspect import command

    for variables, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            patch.setenv("TERM", "xterm")
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", terminal := Terminal())
            assert command([str(chat), "--step=1", "--context-length=64"]) == 0
        assert ("\x1b[32m<b> words" in terminal.getvalue()) == colored
        assert ("⟦<b> words" in terminal.getvalue()) != colored


def test_what_cannot_be_is_one_line(
    chat: Path, tiny_data: Path, mixed: tuple[Path, dict[int, Batch]], tmp_path: Path
) -> None:
    run = mixed[0]
    (tmp_path / "empty").mkdir()
    for args, message in (
        ([], "name what to inspect: a data folder or a run, or else several folders by --mixture"),
        ([chat, "--mixture", f"{chat}=1"], "name what to inspect"),
        ([tmp_path / "empty"], "is neither a data folder, with a meta.json, nor a run, with a config.json"),
        ([chat.parent / "dat"], f"did you mean {chat}?"),
        ([chat, "--step=0"], "step = 0 is not possible: it must be 1, which is the first one, or more"),
        ([chat, f"--step={2**31}"], "step = 2147483648 is not possible"),
        ([chat, "--rows=0"], "rows = 0 is not possible: it must be 1 or more"),
        ([chat, "--step=1", "--split=val"], "steps are of the training split"),
        ([chat, "--curriculum=5:1"], "--curriculum goes with --mixture only"),
        ([chat, "--batch-size=0"], "data.batch_size = 0 is not possible: it must be 1 or more"),
        ([chat, "--context-length=0"], "model.context_length = 0 is not possible: it must be 1 or more"),
        ([chat, "--seed=-1"], "train.seed = -1 is not possible"),
        ([tiny_data, "--step=1", "--context-length=90000"], "and no window of model.context_length + 1 = 90001"),
        (["--mixture", f"{chat}=1", f"{tiny_data}=x"], "data.mixture = "),
        (["s3://"], "s3:// is no whole address"),
    ):
        assert message in refused_here("inspect", *args)
    assert "--split" in refused_here("inspect", chat, "--split=test", status=2)
    out, _ = run_here("inspect", tiny_data, "--context-length=90000")
    assert re.search(r"  stream +no whole window: [\d,]+ tokens\n", out)

    data, text, other = tmp_path / "data", tmp_path / "a.txt", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    run_here("train", *TINY, f"--data.dir={data}", f"--out-dir={other}", "--train.steps=3")
    run_here("inspect", other, "--step=1")
    text.write_text("another text " * 500)
    run_here("prepare", text, "--out", data, "--tokenizer=bytes", "--force")
    error = refused_here("inspect", other, "--step=1")
    assert "was trained with another data" in error
    assert error.endswith("; or name the data folder itself, to see what is in it now")
    assert run.exists()


def test_what_prepare_shows_is_an_example(tmp_path: Path) -> None:
    answers = ["long " * 1000, *(f"{i} " * 2500 for i in range(9))]
    turns = [[{"role": "user", "content": "question"}, {"role": "assistant", "content": a}] for a in answers]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    out, _ = run_here("prepare", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer=bytes")
    [example] = re.findall(r"the first example; what is learnt is between ⟦ and ⟧:\n(.*)\nnext: ", out, re.DOTALL)
    note = r" \[\.\.\. [\d,]+ characters left out \.\.\.\] "
    assert re.fullmatch(r"<\|user\|>question<\|end\|><\|assistant\|>⟦long .*⟧" + note + r"⟦.*long <\|end\|>⟧", example)
    assert len(example) < 1600


def test_columns_are_aligned_and_nothing_acts() -> None:
    bars = Bars("b\x1b", [Bar(("语", "10"), 8.0), Bar(("abc", "1"), 1.0), Bar(("", "0"), 0.0)])
    table = Table("t", {"语言": "x", "name\ud800": "y\x1b[31m"})
    passage = Passage("p", [("document 1", [Run("<x>", True)]), ("2 tokens of padding", [])])
    text = to_text([bars, table, passage], color=False)
    assert text == (
        "b\\x1b\n   语  10  ████████████████████████████████████████\n  abc   1  █████\n        0\n\n"
        "t\n  语言        x\n  name\\ud800  y\\x1b[31m\n\n"
        "p\n── document 1 ──\n⟦<x>⟧\n── 2 tokens of padding ──"
    )
    page = to_page("<title>", [bars, table, passage])
    page.encode()
    assert "<title>&lt;title&gt;</title>" in page
    assert '<pre dir="auto">\n<mark>&lt;x&gt;</mark></pre>' in page
    assert "\x1b" not in page
    assert '<td>abc<td>1<td><i style="width:12.50%">' in page


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preferences with {n} answers, "),
        ({"prompt": "1 + 1?", "answer": "2"}, "problems, "),
    ],
    ids=["preferences", "problems"],
)
def test_sets_are_counted_and_have_no_windows(row: dict[str, str], told: str, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_here("prepare", tmp_path / "a.jsonl", "--out", tmp_path / "set", "--tokenizer", "bytes")
    counts = load_meta(tmp_path / "set").report["train"]
    out, _ = run_here("inspect", tmp_path / "set")
    assert told.format(n=counts.get("answers")) in out
    assert "training documents by their length in tokens" in out
    assert "in windows of" not in out
    assert "and next_token needs text" in refused_here("inspect", tmp_path / "set", "--step", 1)
