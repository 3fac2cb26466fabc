"""Odd command lines: each is understood as it is meant, or refused in one line with the right status.

All run in the process of the tests, but for those about the process itself: its descriptors and its streams.
"""

import contextlib
import io
import json
import os
import pwd
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest

from gpt_jax import runtime
from gpt_jax.cli.main import main
from gpt_jax.cli.parse import parse
from gpt_jax.cli.sample import SampleArgs
from gpt_jax.cli.terminal import print_json
from gpt_jax.cli.train import train_arguments
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.run.records import read_records
from gpt_jax.runtime import use_compile_cache
from tests import tiny
from tests.commands import ROOT, TINY
from tests.interop.models import publish

CONFIGS = {
    "broken.py": "config = (",
    "raises.py": "1 / 0",
    "exits.py": "raise SystemExit(0)",
    "empty.py": "",
    "other.py": "config = 3",
    "nul.py": "config = '\0'",
    "imports.py": "import nothing_of_this_name",
    "endless.py": "def f(): f()\nf()",
    "value.py": "from gpt_jax.config import *\nconfig = Config(model=ModelConfig(n_layer=0))",
    "field.py": "from gpt_jax.config import *\nconfig = Config(model=ModelConfig(n_layers=1))",
    "prints.py": "print('hello')\nfrom gpt_jax.config import Config\nconfig = Config()",
    "text.txt": "the cat sat on the mat. " * 100,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configuration files, texts, a model, and things that are none of these."""
    folder = tmp_path_factory.mktemp("odd")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "crlf.txt").write_bytes("a\r\n语".encode())
    (folder / "empty folder").mkdir()
    publish(folder / "a model", tiny.ONE_LAYER)
    prepare(PrepareArgs(source=(str(folder / "text.txt"),), out=folder / "data", tokenizer="bytes", workers=1))
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in that folder, on one of the devices that were set up already."""
    monkeypatch.chdir(place)
    one = runtime.local_devices()[:1]
    monkeypatch.setattr(runtime, "setup", lambda cpu_devices=1: None)
    monkeypatch.setattr("gpt_jax.run.load.local_devices", lambda: one)


USAGE = {
    "help": "there is no command 'help'. The commands are prepare, inspect, train, sample, serve, eval, examples, ",
    "": "there is no command ''.",
    "TRAIN": "there is no command 'TRAIN'.",
    "sample.py": "there is no command 'sample.py'; did you mean sample?",
    "sämple": "there is no command 'sämple'; did you mean sample?",
    "--json": "there is no command '--json'.",
    "sample --temprature 1": "Unrecognized options: --temprature, 1; did you mean --temperature?; see ",
    "sample --temperature": "Missing value for argument '--temperature'.",
    "sample --temperature=": "Error parsing --temperature: could not convert string to float: ''",
    "sample --temperature=1,5": "could not convert string to float: '1,5'",
    "sample --temperature 1 2": "Unrecognized options: 2;",
    "sample --seed 1.5": "Error parsing --seed: invalid literal for int() with base 10: '1.5'",
    f"sample --top-k {'9' * 5000}": "Error parsing --top-k: Exceeds the limit (4300 digits)",
    "sample --json=true": "Unrecognized options: true;",
    "sample --no-json": "Unrecognized options: --no-json; did you mean --json?",
    "sample foo": "Unrecognized options: foo;",
    "sample -- foo": "Unrecognized options: foo;",
    "sample -p x": "Unrecognized options: -p, x;",
    "sample —-prompt x": "Unrecognized options: —-prompt, x;",
    "sample @arguments": "Unrecognized options: @arguments;",
    "train --model.n-layer": "Missing value for argument '--model.n-layer'.",
    "train --model.n-layer=2=3": "Error parsing --model.n-layer: invalid literal for int() with base 10: '2=3'",
    "train --Model.n-layer 3": "did you mean --model.n-layer?",
    "train --learning-rate 1": "did you mean --optimizer.learning-rate?",
    "train --out-dir --resume": "Missing value for argument '--out-dir'.",
    "train --resume=true": "Unrecognized options: true;",
    "eval --split test": "invalid choice 'test' for argument '--split'. Expected one of ('train', 'val')",
    "prepare text.txt": "Missing from gpt-jax prepare: --out PATH",
}
REFUSED = {
    "export": "out = '' is not possible: it must be the folder to write: --out FOLDER",
    "export --run text.txt --out e": "text.txt/config.json cannot be read (",
    "sample": "/runs; train one with ",
    "sample --prompt": "/runs; train one with ",
    "sample --run text.txt": "text.txt/config.json cannot be read (",
    "sample --run nowhere": "nowhere is not a run: it has no config.json",
    "sample --model text.txt": "text.txt is damaged or no GGUF file",
    "sample --model data": "data is no folder of a published model",
    "sample --model ~nosuchuser/x": "there is no folder or file ~nosuchuser/x",
    "sample --model data --run data": "--model names a model, and --run or --checkpoint another one",
    "sample --prompt-file data": "prompt file data cannot be read: Is a directory",
    "sample --prompt-file nowhere": "prompt file nowhere cannot be read: No such file or directory",
    "sample --prompt-file latin1.txt": "prompt file latin1.txt is not UTF-8 text: byte 3 is not; convert it first",
    "sample --prompt-file /proc/self/mem": "prompt file /proc/self/mem cannot be read: Input/output error",
    "sample --seed 2147483648": "seed = 2147483648 is not possible: it must be at least 0 and less than 2**31",
    "sample --seed -1": "seed = -1 is not possible",
    "sample --temperature -inf": "temperature = -inf is not possible: it must be 0 (greedy) or more",
    "sample --temperature nan": "temperature = nan is not possible",
    "sample --top-p 1e-400": "top_p = 0.0 is not possible: it must be more than 0",
    "sample --repetition-penalty inf": "repetition_penalty = inf is not possible: it must be between 1e-06 and 1e+06",
    "sample --num-samples 0": "num_samples = 0 is not possible: it must be 1 or more",
    "sample --max-new-tokens -5": "max_new_tokens = -5 is not possible: it must be 1 or more",
    "sample --context-length -1": "context_length = -1 is not possible",
    "train nowhere.py": "no configuration file nowhere.py;",
    "train data": "no configuration file data;",
    "train /dev/null": "no configuration file /dev/null;",
    "train text.txt": "text.txt is not a Python file;",
    "train broken.py": "broken.py could not be run: SyntaxError: '(' was never closed (broken.py, line 1)",
    "train raises.py": "raises.py could not be run: ZeroDivisionError: division by zero",
    "train exits.py": "exits.py could not be run: SystemExit: 0",
    "train empty.py": "empty.py does not define `config = Config(...)`",
    "train other.py": "other.py does not define `config = Config(...)`",
    "train nul.py": "nul.py could not be run: SyntaxError: source code string cannot contain null bytes",
    "train imports.py": "imports.py could not be run: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "train endless.py": "endless.py could not be run: RecursionError",
    "train value.py": "value.py: model.n_layer = 0 is not possible: it must be 1 or more",
    "train field.py": "field.py could not be run: TypeError: ModelConfig.__init__() got an unexpected keyword",
    "plan broken.py": "broken.py could not be run: SyntaxError",
    "train --resume x.py y.py": "no configuration file x.py;",
    "train --model.n_layer -3": "model.n_layer = -3 is not possible: it must be 1 or more",
    "train --model.n-layer 1_000 --model.n-head 7": "model.n_head = 7 is not possible: it must be a divisor of",
    "train --coordinator here": "coordinator = 'here' is not possible: it must be auto, or HOST:PORT",
    "plan --target v5e-0": "there is no target 'v5e-0';",
    "plan --tries -1": "tries = -1 is not possible: it must be 0 or more",
    "prepare nowhere --out o": "there is no file or folder 'nowhere';",
    "prepare /dev/null --out o": "/dev/null is not a regular file;",
    "prepare text.txt --out text.txt": "text.txt exists and was not written by this command; choose another --out",
    "prepare text.txt --out text.txt/x --tokenizer bytes": "text.txt/x could not be written (Not a directory)",
    "prepare text.txt --out /proc/o --tokenizer bytes": "/proc/o could not be written (",
    "prepare text.txt --out o --val-fraction 2": "val_fraction = 2.0 is not possible",
}


def line_of(argv: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that is refused, and returns the one line that it says."""
    returned = main(argv)
    err = capsys.readouterr().err
    assert returned == status, err
    assert err.startswith("error: "), err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("line", USAGE, ids=lambda line: line[:40])
def test_what_no_command_can_be_built_from(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert USAGE[line] in line_of(line.split(" "), 2, capsys)


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:40])
def test_what_is_not_possible(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED[line] in line_of(line.split(" "), 1, capsys)
    assert not Path("o").exists()


def test_what_a_configuration_prints_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "prints.py", "--train.steps", "0"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("hello\n")
    assert told.err == "error: train.steps = 0 is not possible: it must be 1 or more\n"


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--seed", "1", "--seed=2"], "seed", 2),
        (["--max_new_tokens=7"], "max_new_tokens", 7),
        (["--max-new-tokens", "7"], "max_new_tokens", 7),
        (["--stop", "a b", "\n", "语"], "stop", ("a b", "\n", "语")),
        (["--stop=--"], "stop", ("--",)),
    ],
    ids=str,
)
def test_settings_in_any_form(argv: list[str], field: str, value: object) -> None:
    assert getattr(parse(SampleArgs, argv, "sample").settings, field) == value


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["--prompt", "a b", "", " c\n"], ("a b", "", " c\n")),
        (["--prompt=-5"], ("-5",)),
        (["--prompt", "-5"], ("-5",)),
        (["--prompt=--json"], ("--json",)),
        (["--prompt=a=b"], ("a=b",)),
        (["--prompt", "a", "--prompt", "b"], ("b",)),
        (["--prompt", "--json"], ()),
    ],
    ids=str,
)
def test_prompts_in_any_form(argv: list[str], prompts: tuple[str, ...]) -> None:
    assert parse(SampleArgs, argv, "sample").prompt == prompts


def test_of_two_folders_the_last_one_holds() -> None:
    assert train_arguments(["--out-dir", "a b", "--out_dir=c=d"])[0].out_dir == "c=d"


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "--prompt", "x", "--help"],
        ["sample", "-h", "--temperature", "warm"],
        ["train", "--model.n-layer", "0", "--help"],
        ["eval", "--help", "--help"],
        ["sample", "--tyro-print-completion", "bash"],
    ],
    ids=str,
)
def test_help_in_odd_places(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert not ended.value.code
    told = capsys.readouterr()
    assert f"gpt-jax {argv[0]}" in told.out
    assert told.err == ""


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help", "sample"]], ids=str)
def test_the_commands_are_told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: gpt-jax COMMAND [OPTIONS]\n")


def boxes(out: str) -> list[str]:
    """The lines of help that are in boxes: all but the usage and the description, which the terminal breaks."""
    return [line for line in out.splitlines() if not line[:1].isalpha()]


@pytest.mark.parametrize(
    ("columns", "width"),
    [("1", 40), ("5", 40), ("39", 40), ("0", 80), ("-1", 80), ("abc", 80), ("", 80), ("100", 100), ("100000", 400)],
)
def test_help_has_a_width_for_any_terminal(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_terminal(descriptor: int) -> NoReturn:
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert os.environ["COLUMNS"] == columns
    out = capsys.readouterr().out
    assert "--max-new-tokens" in out
    assert max(map(len, boxes(out))) <= width
    assert main(["train", "--learning-rate", "1"]) == 2
    assert "did you mean --optimizer.learning-rate?" in capsys.readouterr().err


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((3, 24)))
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "COLUMNS" not in os.environ
    assert max(map(len, boxes(capsys.readouterr().out))) <= 40


SAMPLE = ["sample", "--model", "a model", "--max-new-tokens", "4"]


def sampled(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The one result of `sample`, which must be JSON without any extension of it."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    assert main([*SAMPLE, "--max-new-tokens", "1", "--top-p", "1", *args, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    return value


def test_temperatures_at_the_edges_of_float32(capsys: pytest.CaptureFixture[str]) -> None:
    greedy = sampled(capsys, "--prompt", "a", "--temperature", "-0.0")
    assert len(greedy["tokens"]) == 1
    assert sampled(capsys, "--prompt", "a", "--temperature", "1e-38") == greedy
    hot = sampled(capsys, "--prompt", "a", "--temperature", "inf")
    assert all(0 <= token < 261 for token in hot["tokens"])
    assert all(logprob <= 0 for logprob in hot["logprobs"])


def greedy_text(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*SAMPLE, "--temperature", "0", *args]) == 0
    return capsys.readouterr().out


def test_prompts_from_any_kind_of_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, line ends too: a file, standard input, a FIFO, and one that is empty."""
    expected = greedy_text(capsys, "--prompt", "a\r\n语")
    assert expected.startswith("a\r\n语")
    assert greedy_text(capsys, "--prompt-file", "crlf.txt") == expected

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("crlf.txt").read_bytes()), encoding="ascii"))
    assert greedy_text(capsys, "--prompt-file", "-") == expected

    os.mkfifo("fifo")
    writer = threading.Thread(target=lambda: Path("fifo").write_bytes(Path("crlf.txt").read_bytes()))
    writer.start()
    assert greedy_text(capsys, "--prompt-file", "fifo") == expected
    writer.join()

    assert greedy_text(capsys, "--prompt-file", "/dev/null") == greedy_text(capsys, "--prompt", "")


def test_standard_input_that_is_not_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    line = line_of([*SAMPLE, "--prompt-file", "-"], 1, capsys)
    assert "prompt file - is not UTF-8 text: byte 3 is not; convert it first" in line


def test_a_prompt_that_is_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As Python reads it where an argument is not UTF-8."""
    assert "character 3 of the text is half of a surrogate pair" in line_of(
        [*SAMPLE, "--prompt", "caf\udce9"], 1, capsys
    )


def test_a_model_without_a_template_has_no_chat(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the tokenizer has no chat template" in line_of([*SAMPLE, "--chat"], 1, capsys)


@pytest.mark.parametrize(
    ("encoding", "text"), [("ascii", '"\\u8bed\\udcff"'), ("latin-1", '"\\u8bed\\udcff"'), ("UTF-8", '"语?"')]
)
def test_json_is_whole_in_any_encoding(encoding: str, text: str) -> None:
    """Characters that the output lacks would become question marks; half of a surrogate pair is in no encoding. The
    line is there at once, for a program that reads it from a pipe."""
    out = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(out, encoding=encoding, errors="replace")):
        print_json({"text": "语\udcff"})
        assert out.getvalue().decode() == f'{{"text": {text}}}\n'


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_finite_numbers_only(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"loss": number})


def test_a_character_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main([*SAMPLE, "--temperature", "0", "--prompt", "语"]) == 0
    assert out.getvalue().startswith(b"?")


def test_a_working_folder_that_was_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gone").mkdir()
    with contextlib.chdir(tmp_path / "gone"):
        (tmp_path / "gone").rmdir()
        line = line_of(["sample"], 1, capsys)
    assert line == "error: the working folder does not exist any more; change to one that does\n"


def test_a_user_without_a_home_folder_has_no_compile_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that runs under a number."""

    def nobody(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    jax.config.update("jax_compilation_cache_dir", folder)
    told = "no compile cache: ~/.cache/gpt_jax cannot be made (this user has no home folder; set XDG_CACHE_HOME)\n"
    assert capsys.readouterr().err == told
    assert not Path("~").exists()


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command line of bash, in which $gpt stands for gpt-jax."""
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "gpt": f"{sys.executable} -m gpt_jax",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONUNBUFFERED": "",
        },
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_like_dev_null(closed: str) -> None:
    """The usage and an error; the status is right, and what is open gets what it would."""
    done = shell(f"( $gpt {closed} ); a=$?; ( $gpt nonsense {closed} ); echo $a $?")
    assert done.stdout.splitlines()[-1] == "0 2"
    assert ("usage: " in done.stdout) is (">&-" not in closed.replace("2>&-", ""))
    assert ("error: there is no command 'nonsense'" in done.stderr) is ("2>&-" not in closed)
    assert "Traceback" not in done.stderr


def test_data_are_the_same_with_closed_descriptors(tmp_path: Path) -> None:
    """Which the tokenising processes inherit."""
    done = shell(f"$gpt prepare text.txt --out '{tmp_path}/data' --tokenizer bytes <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in ("train-00000-of-00001.bin", "val-00000-of-00001.bin", "tokenizer.json"):
        assert (tmp_path / "data" / name).read_bytes() == Path("data", name).read_bytes()


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_a_sample_with_closed_descriptors(closed: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = shell(f"$gpt sample --model 'a model' --max-new-tokens 4 --temperature 0 --prompt a {closed}")
    expected = greedy_text(capsys, "--prompt", "a") if closed == "2>&-" else ""
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_a_training_with_closed_descriptors(tmp_path: Path) -> None:
    """It may start itself anew, with another setting of the C library."""
    flags = " ".join([*TINY, "--train.steps=3", "--data.dir=data", "--parallel.devices=1"])
    done = shell(f"$gpt train {flags} --out-dir '{tmp_path}/my run' <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [record["step"] for record in read_records(tmp_path / "my run" / "metrics.jsonl")] == [1, 2, 3]
    text = (tmp_path / "my run" / "metrics.jsonl").read_text()
    assert all(line.startswith("{") for line in text.splitlines())  # Nothing else was written to it.


@pytest.mark.parametrize(
    ("reader", "status", "told"),
    [("> /dev/full", 1, "error: No space left on device\n"), ("| exec true", 141, "")],
)
def test_output_that_cannot_be_written(reader: str, status: int, told: str) -> None:
    """Even when Python writes it at the end only."""
    done = shell(f"set -o pipefail; $gpt {reader}")
    assert (done.returncode, done.stderr) == (status, told)
    done = shell(f"set -o pipefail; $gpt eval --help {reader}")
    assert (done.returncode, done.stderr) == (status, told)
