"""Runs at s3:// equal those in local folders, however they end; and orbax is as it is expected to be."""

import inspect
import json
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from gpt_jax.errors import UserError
from gpt_jax.run.checkpoint import Checkpoints, latest_step
from gpt_jax.run.folder import run_folder
from gpt_jax.run.object_storage import COMMITTED
from gpt_jax.storage.remote import RemotePath, location
from tests.commands import TINY, refused_here, run, run_here, start
from tests.storage.s3 import s3_server
from tests.test_hosts import finish, start_hosts

STEPS = 12
TUNING = ["--model.lora.rank=2", "--model.context-length=16", "--data.batch-size=4", "--train.log-every=1"]
SAVES = ["--train.eval-every=4", "--train.keep-checkpoints=1"]


class Server:
    """The state of an S3 server that a test can stop after a number of requests."""

    bucket = ""
    requests = 0
    last = 1 << 30
    process: Any = None  # Which SIGKILL ends then.

    def denies(self, n: int) -> bool:
        self.requests = n
        if n > self.last and self.process:
            self.process.kill()
        return n > self.last

    @contextmanager
    def stopped_after(self, n: int, process: Any = None) -> Iterator[None]:
        """Answers n requests within the block."""
        self.last, self.process = self.requests + n, process
        try:
            yield
        finally:
            self.last = 1 << 30


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    state = Server()
    with s3_server(denies=state.denies) as state.bucket:
        yield state


@pytest.fixture
def s3(server: Server, request: pytest.FixtureRequest) -> str:
    """The address of an empty folder."""
    return f"{server.bucket}/{request.node.name}"


def arguments(data: object, out: object, steps: int = STEPS) -> list[object]:
    return [*TINY, *SAVES, f"--train.steps={steps}", f"--data.dir={data}", f"--out-dir={out}"]


def data_there(tiny_data: Path, folder: str) -> str:
    """The address of what `tiny_data` is, prepared there of texts that are there."""
    for text in tiny_data.parent.glob("*.txt"):
        RemotePath(f"{folder}/texts/{text.name}").upload(text)
    run_here("prepare", f"{folder}/texts", "--out", f"{folder}/data", "--tokenizer", "bytes")
    return f"{folder}/data"


@pytest.fixture(scope="module")
def local(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a local folder."""
    out = tmp_path_factory.mktemp("local") / "run"
    run_here("train", *arguments(tiny_data, out))
    return out


def contents(out: object) -> tuple[list[Any], dict[str, Any]]:
    """All that a run has logged, but for how long it took, and the checksums of its last checkpoint."""
    folder = run_folder(str(out))
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        step = latest_step(folder.checkpoints)
        sums = {"step": step, **checkpoints.meta(step)["checksums"]}
    return [(r["step"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in folder.records()], sums


@pytest.mark.slow
def test_all_commands_do_there_what_they_do_here(local: Path, s3: str, tiny_data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat. " * 200)
    out = f"{s3}/run"
    run_here("train", *arguments(tiny_data, out))
    assert contents(out) == contents(local)
    names = {path.url.removeprefix(f"{out}/").partition("/")[0] for path in RemotePath(out).files()}
    assert names - {"loss.png"} == {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints"}
    assert [path.name for path in (RemotePath(out) / "checkpoints").iterdir()] == [str(STEPS)]
    results = []
    places: list[tuple[object, object]] = [(local, tmp_path / "here"), (out, f"{s3}/there")]
    for place, start_from in places:
        sampled = run_here("sample", "--run", place, "--prompt", "the cat", "--max-new-tokens=8")
        score = json.loads(run_here("eval", "--run", place, "--json")[0])
        int8 = json.loads(run_here("eval", "--run", place, "--json", "--quantize=int8")[0])
        _, _, inspected = run_here("inspect", place, "--step=2")[0].partition("\n")  # The first line names the run.
        run_here("export", "--run", place, "--out", tmp_path / "exported", "--force")
        run_here("prepare", text, "--tokenizer", place, "--out", tmp_path / "retokenized", "--force")
        run_here("train", "--init-from", place, *TUNING, *arguments(tiny_data, start_from, 4)[len(TINY) :])
        tuned = run_here("sample", "--run", start_from, "--prompt", "the cat", "--max-new-tokens=8")
        results.append(
            [
                *(sampled, score["loss"], int8["loss"], inspected, tuned, contents(start_from)),
                (tmp_path / "exported" / "model.safetensors").read_bytes(),
                *(path.read_bytes() for path in sorted((tmp_path / "retokenized").glob("*.bin"))),
            ]
        )
    assert results[0] == results[1]
    resume = ["--resume", f"--out-dir={s3}/there", f"--init-from={out}", "--train.steps=5"]
    assert "resuming after step 4" in run_here("train", *resume)[0]


@pytest.mark.slow
def test_a_run_that_cannot_write_any_more_goes_on_from_its_last_whole_checkpoint(
    server: Server, local: Path, s3: str, tiny_data: Path
) -> None:
    """What it leaves there is what a process leaves that is killed at that request: it is tried at some of them."""
    run_here("train", *arguments(tiny_data, f"{s3}/whole"))
    before = server.requests
    run_here("train", *arguments(tiny_data, f"{s3}/counted"))
    n_requests = server.requests - before
    expected = contents(local)
    for n in random.Random(0).sample(range(20, n_requests), 2):
        out = f"{s3}/{n}"
        with server.stopped_after(n):
            *notes, line = run_here("train", *arguments(tiny_data, out), status=1)[1].splitlines()
        assert re.match("error: .*(denied|Denied|DENIED|Forbidden|PermissionError)", line), line
        assert all(note.endswith("; trying again") for note in notes), notes
        run_here("train", "--auto-resume", *arguments(tiny_data, out))
        assert contents(out) == expected, n


@pytest.mark.slow
@pytest.mark.usefixtures("quick_commands")
def test_a_killed_process_and_an_interrupted_one(server: Server, s3: str, tiny_data: Path, tmp_path: Path) -> None:
    """With texts, tokens and checkpoints there."""
    run("train", *arguments(tiny_data, tmp_path / "run", 40))
    training = ["train", "--auto-resume", *arguments(data_there(tiny_data, s3), f"{s3}/run", 40)]
    process = start(*training)
    with server.stopped_after(300, process):
        assert process.wait(120) == -signal.SIGKILL
    killed_after = latest_step(location(f"{s3}/run/checkpoints"))
    process = start(*training)
    assert process.stdout
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, err
    assert killed_after < latest_step(location(f"{s3}/run/checkpoints")) < 40
    run(*training)
    assert contents(f"{s3}/run") == contents(tmp_path / "run")
    texts = [run_here("sample", "--run", place, "--prompt", "the cat") for place in (f"{s3}/run", tmp_path / "run")]
    assert texts[0] == texts[1]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_server_that_is_busy_every_fifth_time(local: Path, tiny_data: Path) -> None:
    with s3_server(lambda n: n > 5 and n % 5 == 0) as bucket:
        data = data_there(tiny_data, bucket)
        run_here("train", *arguments(data, f"{bucket}/run"), f"--train.checkpoint-every={STEPS}")
        assert contents(f"{bucket}/run") == contents(local)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick_commands")
def test_two_hosts_write_one_checkpoint_and_go_on_from_it(s3: str, tiny_data: Path, tmp_path: Path) -> None:
    places: list[object] = [tmp_path / "run", f"{s3}/run"]
    for out in places:
        for steps in (4, 6):
            mesh = ["--parallel.devices=1", "--parallel.fsdp=2", "--model.vocab-multiple=8", "--auto-resume"]
            finish(
                start_hosts(2, *SAVES, *mesh, f"--train.steps={steps}", f"--data.dir={tiny_data}", f"--out-dir={out}")
            )
    assert contents(places[1]) == contents(places[0])


def test_what_is_wrong_is_told_in_one_line_before_training(s3: str, tiny_data: Path) -> None:
    def line(out: str, *flags: str) -> str:
        return refused_here("train", *flags, *arguments(tiny_data, out))

    assert line("s3://other-bucket/run").endswith("there is no such bucket or repository")
    assert "checkpoints can be at gs:// and s3:// and in local folders only" in line("memory://other/run")
    assert "holds no run that could be resumed" in line(f"{s3}/run", "--resume")
    assert "is not a run: it has no config.json" in refused_here("sample", "--run", f"{s3}/run")
    assert "is not a run with checkpoints" in refused_here(
        "train", *TUNING, f"--out-dir={s3}/run", f"--data.dir={tiny_data}", f"--init-from={s3}/other"
    )
    assert not RemotePath(s3).is_dir()
    run_here("train", *arguments(tiny_data, f"{s3}/run", 4))
    assert "holds a run already" in line(f"{s3}/run")
    (RemotePath(f"{s3}/run") / "tokenizer.json").unlink()
    assert f"there is no tokenizer in {s3}/run" in refused_here("sample", "--run", f"{s3}/run")
    assert "there is no tokenizer s3://" in refused_here(
        "prepare", tiny_data.parent, "--tokenizer", f"{s3}/no", "--out", tiny_data.parent / "other"
    )


def test_a_damaged_checkpoint_is_set_aside(local: Path, s3: str, tiny_data: Path) -> None:
    out = RemotePath(f"{s3}/run")
    run_here("train", *arguments(tiny_data, out), "--train.keep-checkpoints=2")
    parts = [path for path in (out / "checkpoints" / str(STEPS) / "params").files() if "/d/" in path.url]
    assert len(parts) > 1
    for path in parts:
        path.unlink()
    assert "is damaged" in run_here("train", "--resume", *arguments(tiny_data, out))[1]
    assert contents(out) == contents(local)
    [aside] = (out / "damaged").iterdir()
    assert re.fullmatch(rf"{STEPS}-\d{{8}}-\d{{6}}", aside.name)
    assert (aside / COMMITTED).is_file()


def test_a_checkpoint_without_its_last_file_is_unfinished(s3: str, tiny_data: Path) -> None:
    folder = location(f"{s3}/run/checkpoints")
    run_here("train", *arguments(tiny_data, f"{s3}/run", 8), "--train.keep-checkpoints=2")
    assert latest_step(folder) == 8
    marker = folder / "8" / COMMITTED
    assert isinstance(marker, RemotePath)
    marker.unlink()
    assert latest_step(folder) == 4
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4]


def test_another_process_that_trains_there_is_noticed(s3: str, tiny_data: Path) -> None:
    out = f"{s3}/run"
    run_here("train", *arguments(tiny_data, out, 4))
    ours, theirs = run_folder(out), run_folder(out)
    for run_of in (ours, theirs):
        with run_of.metrics_file.open("a") as file:
            file.write(json.dumps({"step": 5}) + "\n")
    ours.upload()
    with pytest.raises(UserError, match=r"metrics.jsonl was changed by another process; only one may write"):
        theirs.upload()


def test_orbax_has_the_names_that_are_replaced() -> None:
    """Also the places where it uses them: others may come with a new version of orbax."""
    for module, name, n_uses in (
        (gcs_utils, "_GCS_PATH_PREFIX", 5),
        (gcs_utils, "get_kvstore_for_gcs", 1),
        (tensorstore_utils, "get_kvstore_for_gcs", 2),
        (tensorstore_utils, "_use_gcs_driver", 3),
        (tensorstore_utils, "_normalize_path", 3),
    ):
        assert len(re.findall(rf"\b{name}\b", inspect.getsource(module))) == n_uses, name
