"""The commands as a user meets them: what they make, and the one line that they say to what cannot be."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_jax.cli.main import main
from gpt_jax.cli.parse import default_config_path
from gpt_jax.cli.train import train_arguments
from tests.commands import ROOT, TINY, environment, records, refused, refused_here, run, run_here, start

pytestmark = pytest.mark.usefixtures("quick_commands")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, after a training with everything switched on."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    stdout, stderr = run(
        *("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={out}", "--train.steps=40", "--train.eval-every=10"),
        *("--train.sample-every=20", "--train.sample-tokens=8", "--train.tensorboard", "--profile"),
    )
    assert "first step:" in stdout
    assert stdout.count("val loss") == 4
    assert stdout.count("--- sample") == 2
    assert stderr == ""
    return out


def test_a_run_explains_itself(trained: Path) -> None:
    assert {"config.json", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints", "tensorboard", "profile"} <= {
        path.name for path in trained.iterdir()
    }
    assert list((trained / "tensorboard").glob("events*"))
    assert list((trained / "profile").rglob("*.xplane.pb"))
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = records(trained)
    assert [line["step"] for line in lines] == list(range(1, 41))
    common = {"step", "loss", "lr", "grad_norm", "tokens", "epoch", "tokens_per_second", "step_ms", "mfu"}
    for line in lines:
        evaluated = {"val_loss", "val_bits_per_byte"} if line["step"] % 10 == 0 else set()
        assert set(line) == common | evaluated
    assert lines[-1]["tokens"] == 40 * 8 * 16
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert lines[-1]["mfu"] is None  # A CPU has no known peak.


def test_an_evaluation_is_the_same_number_every_time(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The state of step 10, reached in another process with other evaluations on the way."""
    args = ("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={tmp_path / 'r'}", "--train.steps=40")
    run(*args, "--train.eval-every=5")
    ours = {r["step"]: r["val_loss"] for r in records(tmp_path / "r") if "val_loss" in r}
    expected = {r["step"]: r["val_loss"] for r in records(trained) if "val_loss" in r}
    assert expected.items() <= ours.items()


@pytest.mark.slow
def test_same_seed_same_text(trained: Path) -> None:
    args = ("sample", f"--run={trained}", "--prompt", "the cat", "--max-new-tokens=30")
    first, _ = run(*args)
    assert first.startswith("the cat")
    assert run(*args)[0] == first
    assert run_here(*args, "--seed=1")[0] != run_here(*args)[0]


def test_json_output(trained: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("语言 the", encoding="utf-8")
    out, _ = run_here(
        "sample", f"--run={trained}", f"--prompt-file={prompt}", "--num-samples=3", "--max-new-tokens=7", "--json"
    )
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 3
    for result in results:
        assert result["prompt"] == "语言 the"
        assert len(result["tokens"]) == len(result["logprobs"]) <= 7
        assert all(logprob <= 0 for logprob in result["logprobs"])
        assert result["finish_reason"] in ("length", "end_of_text")


def test_sampling_several_prompts_prints_each(trained: Path) -> None:
    out, _ = run_here(
        "sample", f"--run={trained}", "--prompt", "the", "a mat and", "--max-new-tokens=5", "--checkpoint=best"
    )
    assert "--- 1 of 2\nthe" in out
    assert "--- 2 of 2\na mat and" in out


def test_the_newest_run_is_the_default(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "mine")
    process = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--prompt", "the cat", "--max-new-tokens=5"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.startswith("the cat")


def test_the_scripts_are_the_commands() -> None:
    for script, name in (("train.py", "train"), ("sample.py", "sample")):
        by_script = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert by_script.stdout == run(name, "--help")[0]
    assert "--model.n-layer" in run("train", "--help")[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    error = refused_here(
        "train",
        "--resume",
        f"--out-dir={out}",
        "--optimizer.learning-rate=1e30",
        "--optimizer.clip-norm=0",
        "--train.steps=80",
    )
    assert error.startswith("error: step 42: the ")
    assert "so training stops and this state is not saved" in error
    assert "40" in [p.name for p in (out / "checkpoints").iterdir()]
    assert records(out)[-1]["step"] in (40, 41)


def test_ctrl_c_while_sampling_ends_quietly(trained: Path) -> None:
    # Greedy, since a text that is drawn may end by itself before the signal comes.
    process = start("sample", f"--run={trained}", "--prompt", "the cat", "--temperature=0", "--max-new-tokens=100000")
    assert process.stdout is not None
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "interrupted")


DROPPED_IN = {
    "a destructor": """
class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
Dropped()
""",
    "a callback of a weak reference": """
class Dropped:
    pass
x = Dropped()
reference = weakref.ref(x, lambda reference: signal.raise_signal(signal.SIGTERM))
del x
""",
    "a callback of the garbage collector": """
def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGTERM)
gc.callbacks.append(callback)
gc.collect()
""",
}


def run_as_train(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in the place of the training command, in a process of its own."""
    program = f"""
import gc, signal, sys, time, types, weakref
from gpt_jax.cli import main
sys.modules["gpt_jax.cli.train"] = types.SimpleNamespace(command=lambda argv: exec({code!r}, globals()))
main.run(["train"])
"""
    return subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("where", DROPPED_IN)
def test_an_interrupt_is_not_lost_where_python_drops_what_is_raised(where: str) -> None:
    process = run_as_train(DROPPED_IN[where] + "time.sleep(20)")  # Which the interrupt ends, later on a loaded machine.
    assert (process.returncode, process.stderr) == (143, "\ninterrupted\n")


def test_other_exceptions_that_python_drops_are_told() -> None:
    process = run_as_train("""
class Dropped:
    def __del__(self):
        raise ValueError("seen")
Dropped()
sys.exit(0)
""")
    assert process.returncode == 0
    assert "ValueError: seen" in process.stderr


def test_an_error_that_comes_of_an_interrupt_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where C code is interrupted: SystemError, "returned a result with an exception set"."""

    def command(argv: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as e:
            raise SystemError("returned a result with an exception set") from e

    monkeypatch.setattr("gpt_jax.cli.plan.command", command)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--model.n-layr", "3"], "did you mean --model.n-layer?"),
        (["train", "--model.n-layer", "three"], "--model.n-layer"),
        (["train", "--model.attention", "fast"], "'fast' for argument '--model.attention'"),
        (["train", "--learning-rate", "1"], "did you mean --optimizer.learning-rate?"),
        (["sample", "--max-tokens", "5"], "did you mean --max-new-tokens?"),
        (["prepare", "--out", "x", "--tokenzier", "bytes", "python-docs"], "did you mean --tokenizer?"),
        (["trian"], "there is no command 'trian'; did you mean train?"),
    ],
)
def test_wrong_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "nowhere.py"], "no configuration file nowhere.py"),
        (["train", "configs/shakespeare_char.py", "--model.no-bias", "--model.n-head", "5"], "model.n_head = 5 is not"),
        (["train", "--model.n-head", "5"], "model.n_head = 5 is not possible: it must be a divisor of model.d_model"),
        (["train", "--model.dropout", "1.5"], "model.dropout = 1.5 is not possible: it must be at least 0 and less"),
        (["train", "--train.steps", "0"], "train.steps = 0 is not possible: it must be 1 or more"),
        (["train", "--data.dir", "nowhere", "--data.source", "--out-dir", "nowhere"], "no data folder nowhere"),
        (["sample", "--temperature=-1"], "temperature = -1.0 is not possible: it must be 0 (greedy) or more"),
        (["sample", "--prompt-file", "nowhere.txt"], "prompt file nowhere.txt cannot be read: No such file"),
        (["sample", "--prompt", "a", "--prompt-file", "b"], "were both given"),
        (["train", "--resume", "--out-dir", "nowhere"], "nowhere holds no run that could be resumed"),
    ],
)
def test_impossible_requests(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_train_refuses_what_does_not_fit(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = f"--data.dir={tiny_data}"
    out = f"--out-dir={tmp_path / 'run'}"
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))

    assert "holds a run already" in refused("train", *TINY, data, f"--out-dir={trained}")
    assert "data.batch_size = 9 does not divide over 2 devices" in refused_here(
        "train", *TINY, data, out, "--data.batch-size=9", "--parallel.devices=2"
    )
    assert "data.microbatch_size = 3 does not divide" in refused_here(
        "train", *TINY, data, out, "--data.microbatch-size=3"
    )
    assert "and no window of model.context_length + 1 = 100001" in refused_here(
        "train", *TINY, data, out, "--model.context-length=100000"
    )
    assert "model.vocab_size = 99 is not possible: it must be at least the" in refused_here(
        "train", *TINY, data, out, "--model.vocab-size=99"
    )
    assert "cudnn cannot run here: it needs an NVIDIA GPU" in refused_here(
        "train", *TINY, data, out, "--model.attention=cudnn"
    )
    assert "train.seed is 0 in checkpoint" in refused_here(
        "train", "--resume", f"--out-dir={trained}", "--train.seed=1", "--train.steps=50"
    )
    assert "data.vocab_size = 99, but" in refused_here("train", *TINY, data, out, "--data.vocab-size=99")
    assert "the prompt has 40 tokens" in refused_here("train", *TINY, data, out, f"--train.sample-prompt={'x' * 40}")
    assert "model.d_model is 16 there and 32 here" in refused_here(
        "train", "--resume", f"--out-dir={trained}", "--model.d-model=32", "--train.steps=50"
    )
    assert not (tmp_path / "run").exists()
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*")) == before


def test_other_data_is_refused_on_resume(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("quite another text. " * 500)
    run_here("prepare", text, "--out", tmp_path / "other", "--tokenizer=bytes")
    error = refused_here(
        "train", "--resume", f"--out-dir={trained}", f"--data.dir={tmp_path / 'other'}", "--train.steps=50"
    )
    assert "was trained with another data than that of the data folder" in error


def test_two_processes_cannot_train_in_one_folder(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ("train", *TINY, f"--data.dir={tiny_data}", "--train.steps=100000")
    process = start(*args, f"--out_dir={out}")  # With an underscore, as flags may be written.
    while not records(out):
        assert process.poll() is None
        time.sleep(0.01)
    assert "another process is training in" in refused_here(*args, f"--out-dir={out}", "--resume")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_truncated_shard_is_named(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = data / "train-00000-of-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "train-00000-of-00001.bin" in refused_here(
        "train", *TINY, f"--data.dir={data}", f"--out-dir={tmp_path / 'run'}"
    )


def test_sample_refuses_what_does_not_belong_together(trained: Path, tmp_path: Path) -> None:
    assert "nowhere is not a run: it has no config.json" in refused_here("sample", "--run=nowhere")
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    assert "the prompt has 17 tokens, and the model's context_length is 16" in refused_here(
        "sample", f"--run={run_dir}", "--prompt", "x" * 17
    )
    assert "there is no checkpoint 7" in refused_here("sample", f"--run={run_dir}", "--checkpoint=7")

    for item in (run_dir / "checkpoints" / "40" / "params").rglob("manifest.ocdbt"):
        item.write_bytes(b"")
    assert "checkpoints/40 is damaged: params cannot be read" in refused_here("sample", f"--run={run_dir}")

    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven\n" * 100)
    run_here("prepare", words, "--out", tmp_path / "other", "--vocab-size=30", "--model-type=char")
    (run_dir / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "other" / "tokenizer.model", run_dir)
    assert "is not the one that checkpoint 40 was trained with" in refused_here("sample", f"--run={run_dir}")


def test_a_full_disk_ends_in_one_line_and_keeps_older_checkpoints(trained: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle, in the same way. The files of
    a checkpoint are the first to exceed it, as there are few records and no plot."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "metrics.jsonl").unlink()
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "sys.modules['matplotlib'] = None; from gpt_jax.cli.main import run; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000)); run()"
    )
    process = subprocess.run(
        [sys.executable, "-c", limited, "train", "--resume", f"--out-dir={out}", "--train.steps=60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: "), process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert "checkpoints: the checkpoint could not be saved" in process.stderr
    assert (out / "checkpoints" / "40" / "params").is_dir()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ("train", *TINY, f"--data.dir={tiny_data}", f"--out-dir={out}", "--train.steps=2000")
    process = start(*args)
    while not records(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    stdout, _ = run_here(*args, "--resume", "--train.steps=60", "--train.eval-every=0")
    assert "no checkpoint yet: starting from the first step" in stdout
    assert [r["step"] for r in records(out)] == list(range(1, 61))


def test_out_dir_is_the_flags_or_the_files_or_named_after_the_file(tmp_path: Path) -> None:
    for name, content in (("named", 'Config(out_dir="elsewhere")'), ("plain", "Config()")):
        (tmp_path / f"{name}.py").write_text(f"from gpt_jax.config import Config\nconfig = {content}\n")
    assert train_arguments([str(tmp_path / "named.py")])[0].out_dir == "elsewhere"
    assert train_arguments([str(tmp_path / "plain.py")])[0].out_dir == "runs/plain"
    assert train_arguments([str(tmp_path / "named.py"), "--out_dir=a", "--out-dir", "b"])[0].out_dir == "b"


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Which tyro reads from the comments, where it finds them."""
    for command in ("train", "sample", "prepare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
        alone = [line.startswith("--") and "  " not in line for line in lines]  # A flag with no text beside it.
        bare = [
            a
            for a, b, is_alone in zip(lines, lines[1:], alone[:-1], strict=False)
            if is_alone and b.startswith("(default")
        ]
        assert bare == []
        assert not any(re.match(r"--[a-z.-]+ *\(default", line) for line in lines)


def test_the_default_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the working folder, or else the one that comes with the project."""
    monkeypatch.chdir(tmp_path)
    assert default_config_path() == ROOT / "configs" / "quickstart.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    assert default_config_path() == Path("configs", "quickstart.py")
