"""The command line: `gpt-jax COMMAND`, `python -m gpt_jax COMMAND`, and the scripts train.py and sample.py.

Each command is a frozen dataclass of arguments and a function. What the user can mend is told in one line on standard
error: exit status 2 for the arguments themselves, 1 for what they lead to, 128 + the signal's number after a signal.
"""

import contextlib
import dataclasses
import difflib
import gc
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import tyro

from gpt_jax.config import Config, check, load_config, load_saved_config, with_vocabulary
from gpt_jax.data.shards import open_dataset
from gpt_jax.errors import UserError
from gpt_jax.system import restart_with_huge_pages

Args = TypeVar("Args")
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is only ever switched on; the configuration's have both forms, --model.bias and --model.no-bias."""

EXTRAS = {"tokenizers": "interop", "jinja2": "interop", "gguf": "interop", "google": "interop", "lm_eval": "lm-eval"}
"""Packages that not everybody needs, and the extra that has them. `google` is protobuf."""

USAGE = """usage: gpt-jax COMMAND [OPTIONS]

  prepare   turn text into token files
  train     train a GPT on them
  sample    let a trained GPT write
  eval      tell how well a GPT predicts a text
  export    write a run as a folder that transformers loads
  plan      tell whether a training fits a slice of TPUs or GPUs that is not here, and what bounds it

gpt-jax COMMAND --help tells the options of each."""


class UsageError(UserError):
    """Arguments that no command could be built from."""


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train a GPT. The first argument may be a configuration file; configs/quickstart.py is the default."""

    resume: Switch = False  # Go on with the run in --out-dir, with the configuration saved there and these flags.
    profile: Switch = False  # Write a JAX profiler trace of a few steps to the run's folder.
    # Several hosts: HOST:PORT of the first one, or auto on TPU pods, Slurm, Kubernetes, Open MPI; empty: only this one.
    coordinator: str = ""
    n_hosts: int = 0  # With HOST:PORT: how many hosts there are.
    host_id: int = 0  # With HOST:PORT: which of them this is, from 0.
    join_timeout: int = 300  # Seconds to wait for the other hosts.
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        check(self.join_timeout >= 1, "join_timeout", self.join_timeout, "1 second or more")
        if self.coordinator in ("", "auto"):
            given = "no coordinator" if not self.coordinator else "--coordinator auto"
            check(self.n_hosts == 0, "n_hosts", self.n_hosts, f"left out with {given}")
            return
        port = self.coordinator.rpartition(":")[2]
        check(port.isdecimal(), "coordinator", self.coordinator, "auto, or HOST:PORT such as 10.0.0.1:8476")
        check(self.n_hosts >= 1, "n_hosts", self.n_hosts, "the number of hosts")
        check(0 <= self.host_id < self.n_hosts, "host_id", self.host_id, f"0 to n_hosts - 1 = {self.n_hosts - 1}")


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Tell what a training takes on devices that are not here: memory, what travels, and what bounds its time. The
    first argument may be a configuration file; configs/quickstart.py is the default."""

    target: str = "v5e-4"  # The devices: a TPU slice such as v5e-16, v5p-32, v6e-8, or GPUs such as h100x8.
    tries: int = 4  # Other ways to run it (microbatches, rematerialisation) to compile, for a recommendation; 0: none.
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        check(self.tries >= 0, "tries", self.tries, "0 or more")


def parse(args_type: type[Args], argv: Sequence[str], command: str, default: Args | None = None) -> Args:
    """The arguments as an object. Raises UsageError with tyro's message, in one line."""
    stderr = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(args_type, args=list(argv), prog=f"gpt-jax {command}", **given)
    except SystemExit as e:
        if e.code == 0:  # --help
            raise
        raise UsageError(f"{in_one_line(stderr.getvalue())}; see gpt-jax {command} --help") from None


def in_one_line(box: str) -> str:
    """The message in an error box that tyro draws, and the first flag that it suggests.

    The message is the first section of the box; where lines cannot be drawn, the second, below a title.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"^[─-]{5,}$", "\n".join(lines), flags=re.MULTILINE)
    message = sections[0 if "╭" in box else 1 :][0]
    suggestion = re.search(r"Perhaps you meant:\s*(--\S+)", " ".join(lines))
    return " ".join(message.split()) + (f"; did you mean {suggestion[1]}?" if suggestion else "")


def default_config_path() -> Path:
    """quickstart.py: of the working folder's configs/, of the checkout that this package is in, or of the package."""
    package = Path(__file__).parent
    places = [folder / "configs" / "quickstart.py" for folder in (Path(), package.parent, package)]
    return next((path for path in places if path.exists()), places[0])


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The value last given to a flag, before the arguments as a whole can be parsed; None when it is not there."""
    value = None
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else following
    return value


def train_command(argv: Sequence[str]) -> int:
    """Builds the configuration from file, saved run and flags; prepares the data if need be; trains."""
    config, args = train_arguments(list(argv))

    from gpt_jax import hosts, runtime
    from gpt_jax.run.folder import RunFolder
    from gpt_jax.train.loop import Interrupted, train
    from gpt_jax.train.setup import set_up

    if args.coordinator:
        runtime.setup(config.parallel.devices or 1)
        hosts.join(args.coordinator, args.n_hosts, args.host_id, args.join_timeout)
        hosts.check_alike(**{"--resume": str(args.resume)})
        if not hosts.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    hosts.on_first(
        lambda: RunFolder(Path(config.out_dir)).check_usable(args.resume)
    )  # Before minutes go to preparing data.
    config, data = set_up(config, given_fields(argv), args.resume)
    if not args.coordinator:
        runtime.setup(runtime.choose_cpu_devices(config))
    try:
        train(config, data, resume=args.resume, profile=args.profile)
    except Interrupted as e:
        print(f"stopped, and saved; go on with: python train.py --resume --out-dir {config.out_dir}")
        return 128 + e.signum
    return 0


def train_arguments(argv: list[str]) -> tuple[Config, TrainArgs]:
    """The configuration with its out_dir, and the other arguments.

    The flags change the configuration of a file, which may be the first argument or follow --resume or --profile; or
    with --resume, the one that was saved with the run.
    """
    positional = [
        i for i, a in enumerate(argv) if not a.startswith("-") and argv[i - 1 : i] in ([], ["--resume"], ["--profile"])
    ]
    path = Path(argv.pop(positional[0])) if positional else default_config_path()
    out_dir = flag_value(argv, "--out-dir") or load_config(path).out_dir or str(Path("runs") / path.stem)
    saved = Path(out_dir) / "config.json"
    config = load_saved_config(saved) if "--resume" in argv and saved.exists() else load_config(path)
    config = dataclasses.replace(config, out_dir=out_dir)
    args = parse(TrainArgs, argv, "train", TrainArgs(config=config))
    return args.config, args


def given_fields(argv: Sequence[str]) -> set[str]:
    """The full names of the configuration's fields that flags set, such as "model.n_layer" by --model.n-layer=2."""
    flags = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in argv if a.startswith("--"))
    sections = (flag.rpartition(".") for flag in flags)
    return {f"{section}{dot}{name.removeprefix('no_')}" for section, dot, name in sections}


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Let a trained GPT go on from prompts. The same arguments and seed give the same text."""

    run: str = ""  # Folder of the run; empty: the newest under runs/.
    model: str = ""  # In its place: a folder with a published model, a .gguf file, or a name on the hub.
    # Longest text in tokens; 0: the model's own. Longer than that, or another than a run's: where positions are rotary.
    context_length: int = 0
    prompt: tuple[str, ...] = ()  # Texts to go on from, all in one batch; none: the start of a document.
    prompt_file: str = ""  # File whose whole text is the prompt.
    checkpoint: str = "latest"  # latest, best (lowest validation loss), or a step.
    # Tokens to generate at most. When the context is full, the model goes on from the last half of it.
    max_new_tokens: int = 200
    num_samples: int = 1  # Texts for each prompt.
    temperature: float = 0.8  # Divides the logits; 0: always the most probable token.
    top_k: int = 0  # Draw from the k most probable tokens only; 0: from all.
    top_p: float = 0.95  # Draw from the fewest tokens whose probabilities add up to p.
    min_p: float = 0.0  # Draw from tokens at least this many times as probable as the most probable one.
    repetition_penalty: float = 1.0  # Makes tokens that were seen before less probable; 1: does not.
    stop: tuple[str, ...] = ()  # Strings that end a text.
    seed: int = 0  # Decides the draws.
    json: Switch = False  # Print one JSON object a text: tokens, their log-probabilities, why it ended.
    chat: Switch = False  # Talk with the model, which must have a chat template; each line of input is a message.
    system: str = ""  # With --chat: what to tell the model first, such as how to behave.

    def __post_init__(self) -> None:
        check(self.num_samples >= 1, "num_samples", self.num_samples, "1 or more")
        check(self.context_length >= 0, "context_length", self.context_length, "0 (the model's own) or more")
        if self.model and (self.run or self.checkpoint != "latest"):
            raise UserError("--model names a model, and --run or --checkpoint another one; use one of them")
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt-file were both given; use one of them")
        if self.chat and (self.prompt or self.prompt_file or self.json or self.num_samples > 1):
            raise UserError("--chat goes with none of --prompt, --prompt-file, --json and --num-samples")
        if self.system and not self.chat:
            raise UserError("--system goes with --chat only")


def sample_command(argv: Sequence[str]) -> int:
    """Loads a run and prints what its model writes, as it writes it."""
    args = parse(SampleArgs, argv, "sample")

    from gpt_jax import runtime
    from gpt_jax.run.load import choose_source, load_model
    from gpt_jax.sample.decode import Filters, prepare_params
    from gpt_jax.sample.generate import Settings, encode_prompt, generate

    filters = Filters(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    settings = Settings(args.max_new_tokens, args.seed, args.stop, filters)
    prompts = [read_prompt(Path(args.prompt_file))] if args.prompt_file else list(args.prompt) or [""]
    runtime.setup()
    source = choose_source(args.run, args.model, args.checkpoint)
    model, params, tokenizer = load_model(source, args.context_length)
    params = prepare_params(params, model.config, donate=True)  # Once for all answers, and the only copy.

    if args.chat:
        from gpt_jax.sample.chat import HELP, ask_terminal, chat, say_terminal

        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        chat(model, params, tokenizer, settings, args.system or None, ask_terminal, say_terminal)
        return 0

    streams = len(prompts) * args.num_samples == 1 and not args.json
    if streams:
        encode_prompt(prompts[0], tokenizer, model.config.context_length)  # What is refused is not printed first.
        print(prompts[0], end="", flush=True)
    results = generate(
        model,
        params,
        tokenizer,
        prompts,
        settings,
        args.num_samples,
        on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
    )
    if streams:
        print()
        return 0
    for i, result in enumerate(results):
        prompt = prompts[i // args.num_samples]
        if args.json:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(result)}, ensure_ascii=False))
        else:
            print(f"--- {i + 1} of {len(results)}\n{prompt}{result.text}")
    return 0


def read_prompt(path: Path) -> str:
    """The text of a prompt file. Raises UserError when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"prompt file {path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"prompt file {path} is not UTF-8 text: byte {e.start} is not; convert it first") from e


def prepare_command(argv: Sequence[str]) -> int:
    """Turns text into token files."""
    from gpt_jax.data.prepare import PrepareArgs, run_prepare

    args = parse(PrepareArgs, argv, "prepare")
    tokenizer = None
    name = args.tokenizer
    if name.endswith(".gguf") or (name not in ("sentencepiece", "bytes") and not Path(name).exists()):
        from gpt_jax.interop.load import open_named

        tokenizer = open_named(name).tokenizer()
    run_prepare(args, tokenizer)
    return 0


def plan_command(argv: Sequence[str]) -> int:
    """Tells what a training takes on devices that are not here. Status 1 when it does not fit them."""
    words = list(argv)
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else default_config_path()
    args = parse(PlanArgs, words, "plan", PlanArgs(config=load_config(path)))
    config = args.config
    if config.init_from:
        from gpt_jax.train.setup import start_from

        config, tokenizer = start_from(config, given_fields(argv))
        config = with_vocabulary(config, tokenizer.vocab_size)
    elif not config.model.vocab_size and Path(config.data.dir, "meta.json").exists():
        config = with_vocabulary(config, open_dataset(Path(config.data.dir)).tokenizer.vocab_size)
    elif not config.model.vocab_size:  # Not prepared yet: as many tokens as will be asked for.
        config = with_vocabulary(config, config.data.vocab_size)

    # libtpu would ask a cloud machine's metadata server what it is.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
    import jax

    from gpt_jax import runtime
    from gpt_jax.plan.run import can_compile, run_plan
    from gpt_jax.plan.targets import parse_target

    jax.config.update("jax_platforms", "cpu")
    # The cache cannot give back programs for devices that are not here, and warns that it cannot.
    jax.config.update("jax_enable_compilation_cache", False)
    target = parse_target(args.target)
    runtime.setup(1 if can_compile(target) else target.n_devices)
    return run_plan(config, target, args.tries)


def eval_command(argv: Sequence[str]) -> int:
    """Loads a model and prints how well it predicts a text."""
    from gpt_jax.evaluate.run import EvalArgs, run_eval

    run_eval(parse(EvalArgs, argv, "eval"))
    return 0


def export_command(argv: Sequence[str]) -> int:
    """Writes a run as a folder that other software loads."""
    from gpt_jax import runtime
    from gpt_jax.export.run import ExportArgs, run_export

    args = parse(ExportArgs, argv, "export")
    runtime.setup()
    run_export(args)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "prepare": prepare_command,
    "train": train_command,
    "sample": sample_command,
    "eval": eval_command,
    "export": export_command,
    "plan": plan_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. With GPT_JAX_TRACEBACK set, errors are raised and not told."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal that cannot show a character must not end the text.
    try:
        if command in ("-h", "--help"):
            print(USAGE)
            return 0
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"there is no command {command!r}{hint} The commands are {', '.join(COMMANDS)}")
        return COMMANDS[command](argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # The reader, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as e:
        line = told(e)
        if line is None or os.environ.get("GPT_JAX_TRACEBACK"):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def told(e: Exception) -> str | None:
    """What to tell the user of an exception, in one line; None where it is a bug, which needs its traceback."""
    if isinstance(e, UserError):
        return " ".join(str(e).split("\n"))  # Libraries, whose words it may hold, write more than one line.
    if isinstance(e, ModuleNotFoundError) and (package := (e.name or "").split(".")[0]) in EXTRAS:
        return f"this needs the package {package}, which is not installed: pip install 'gpt-jax[{EXTRAS[package]}]'"
    if isinstance(e, OSError) and e.errno is not None:  # A disk that is full or read-only, wherever it was met.
        return f"{e.filename}: {e.strerror}" if e.filename else os.strerror(e.errno)
    from gpt_jax import hosts  # Not before: it brings JAX, for which what is told above need not wait.

    if hosts.lost(e):
        return "another host has gone, see what it said; start all of them again, with --resume if there is a run"
    if isinstance(e, RuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
        return "the device has too little memory; set a smaller data.microbatch_size, or model.remat to full"
    return None


def interrupt(signum: int, frame: FrameType | None) -> None:
    """A handler of SIGINT that raises KeyboardInterrupt, but not where it would be lost.

    What is raised in a callback of the garbage collector, such as JAX has, is printed and forgotten: from there, the
    signal is sent again a little later.
    """
    if frame is not None and any(frame.f_code is getattr(found, "__code__", None) for found in gc.callbacks):
        threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
    else:
        raise KeyboardInterrupt


def run(argv: Sequence[str] | None = None) -> None:
    """`main` as a process of its own.

    A failure ends the process at once: after a failed save, the interpreter's own way out lets the abandoned threads
    and coroutines of the checkpoint library print their tracebacks below the one line that matters.
    """
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # And is not ignored, as of a background job.
        signal.signal(signal.SIGINT, interrupt)
    if argv and argv[0] == "train":
        restart_with_huge_pages()
    try:
        status = main(argv)
    except Exception:
        hosts = sys.modules.get("gpt_jax.hosts")
        if hosts is None or not hosts.several():
            raise
        traceback.print_exc()
        status = 1  # And at once: on its way out, JAX would wait for the other hosts, which wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
