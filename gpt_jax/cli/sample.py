"""`gpt-jax sample`, and sample.py."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from gpt_jax.cli.parse import ModelArgs, Switch, parse
from gpt_jax.cli.terminal import ask, decoded, print_json, say
from gpt_jax.config import CacheDTypeName, ParallelConfig, QuantizeName, check
from gpt_jax.errors import UserError
from gpt_jax.sample.settings import Settings

if TYPE_CHECKING:
    from gpt_jax.run.load import Source
    from gpt_jax.sample.engine import Engine
    from gpt_jax.sample.replicas import Replicas
    from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleArgs(ModelArgs):
    """Let a trained GPT continue prompts. The same arguments and seed give the same text."""

    prompt: tuple[str, ...] = ()  # Texts to continue, all in one batch; none: the start of a document.
    prompt_file: str = ""  # File whose whole text is the prompt; -: standard input.
    prompts: str = ""  # File of prompts to answer by JSON Lines: one a line, or JSON Lines with "prompt" or "messages".
    out: str = ""  # With --prompts: the file of the answers, to which a job that was stopped goes on to add.
    slots: int = 32  # With --prompts: texts that each device writes at the same time; on a mesh, each data part of it.
    num_samples: int = 1  # Texts for each prompt.
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    json: Switch = False  # Print one JSON object a text: tokens, their log-probabilities, why it ended.
    chat: Switch = False  # Talk with the model, which must have a chat template; each line of input is a message.
    system: str = ""  # With --chat: the system prompt, which may say how to behave.
    quantize: QuantizeName = "none"  # int8: round the matrices to 8 bits, with a scale a row; docs/sample.md.
    cache_dtype: CacheDTypeName = "auto"  # int8: round the keys and values of what was read; auto: as the model says.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_samples >= 1, "num_samples", self.num_samples, "1 or more")
        check(self.slots >= 1, "slots", self.slots, "1 or more")
        given = {"--prompt": self.prompt, "--prompt-file": self.prompt_file, "--prompts": self.prompts}
        if len(both := [name for name, value in given.items() if value]) > 1:
            raise UserError(f"{' and '.join(both)} were both given; use one of them")
        if self.chat and (any(given.values()) or self.json or self.num_samples > 1):
            raise UserError("--chat goes with none of --prompt, --prompt-file, --prompts, --json and --num-samples")
        if self.out and not self.prompts:
            raise UserError("--out goes with --prompts only")
        if self.system and not self.chat:
            raise UserError("--system goes with --chat only")


def command(argv: Sequence[str]) -> int:
    """Loads a model and prints its text, as it is generated."""
    args = parse(SampleArgs, argv, "sample")
    if args.prompts:
        answer_prompts(args)
        return 0

    from gpt_jax.sample.engine import ALL_CHUNKS, check_request
    from gpt_jax.sample.generate import MOST_SLOTS, Row, encode_prompt, generate_on

    prompts = [read_prompt(args.prompt_file)] if args.prompt_file else list(args.prompt) or [""]
    n_texts = len(prompts) * args.num_samples
    engine, tokenizer = load_to_write(args, args.source(), n_texts, MOST_SLOTS, 1 if args.chat else ALL_CHUNKS)
    if args.chat:
        from gpt_jax.cli.chat import HELP, chat

        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        succeeds = chat(engine, tokenizer, args.settings, args.system or None, ask, say)
        return 0 if succeeds or sys.stdin.isatty() else 1  # At a terminal, errors have been read by the user.

    streams, T = n_texts == 1 and not args.json, engine.model.config.context_length
    prompt_tokens = [encode_prompt(prompt, tokenizer, T) for prompt in prompts]
    if streams:  # What is raised, is raised before the prompt is printed.
        check_request(Row(prompt_tokens[0], tokenizer, args.settings).request(T), engine.model, engine.n_tokens)
        print(prompts[0], end="", flush=True)
    results = generate_on(
        engine,
        tokenizer,
        prompt_tokens,
        args.settings,
        args.num_samples,
        on_text=(lambda _, text: print(text, end="", flush=True)) if streams else None,
    )
    if streams:
        print()
        return 0
    for i, result in enumerate(results):
        prompt = prompts[i // args.num_samples]
        if args.json:
            print_json({"prompt": prompt, **dataclasses.asdict(result)})
        else:
            print(f"--- {i + 1} of {len(results)}\n{prompt}{result.text}")
    return 0


def answer_prompts(args: SampleArgs) -> None:
    """Answers the prompts of a file, each by a line of JSON."""
    from tqdm import tqdm

    from gpt_jax.sample.batch import job_name, open_answers, read_prompts, run_job
    from gpt_jax.sample.engine import ALL_CHUNKS

    source, where = args.source(), "standard input" if args.prompts == "-" else args.prompts
    prompts = read_prompts(read_prompt(args.prompts), where, args.settings)
    n_texts = len(prompts) * args.num_samples
    with contextlib.ExitStack() as stack:
        done: dict[tuple[int, int], Any] = {}
        answered: Callable[[dict[str, Any]], None] = print_json
        if args.out:  # Before the model is loaded, which takes longer.
            int8 = () if args.quantize == "none" else (args.quantize,)
            cache = () if args.cache_dtype == "auto" else (f"{args.cache_dtype} cache",)
            job = job_name(source.identity(), args.context_length, args.settings, args.num_samples, *int8, *cache)
            answers = stack.enter_context(open_answers(Path(args.out), job, prompts))
            done, answered = answers.done, answers.add
            if len(done) == n_texts:
                print(f"{args.out} has all {n_texts} answers already", file=sys.stderr)
                return
        engine, tokenizer = load_to_write(args, source, n_texts, args.slots, ALL_CHUNKS)
        bar = stack.enter_context(tqdm(total=n_texts, initial=len(done), unit=" texts", disable=None))
        for answer in run_job(engine, tokenizer, prompts, args.num_samples, done):
            answered(answer)
            bar.update()


def load_to_write(
    args: SampleArgs, source: "Source", n_texts: int, slots: int, chunks_a_turn: int
) -> "tuple[Engine | Replicas, Tokenizer]":
    """Loads a model to write so many texts: on a mesh, on as many devices as were asked for, or by default on those of
    this machine that the texts fill, each with at most so many slots."""
    from gpt_jax import runtime
    from gpt_jax.placement import choose_placement
    from gpt_jax.run.load import config_to_load, load_model
    from gpt_jax.sample.decode import prepare_params
    from gpt_jax.sample.replicas import engine_on

    runtime.setup(args.parallel.n_asked or 1)
    devices = runtime.choose_devices(args.parallel)
    if not args.parallel.n_asked:
        devices = devices[: -(-n_texts // slots)]
    placement = choose_placement(args.parallel, config_to_load(source, args.context_length), devices)
    model, params, tokenizer = load_model(source, args.context_length, placement, args.quantize, args.cache_dtype)
    params = prepare_params(params, model.config, donate=True)  # The first copy is freed.
    options = {"n_tokens": tokenizer.vocab_size, "chunks_a_turn": chunks_a_turn}
    return engine_on(placement, model, params, n_texts, slots, **options), tokenizer


def read_prompt(name: str) -> str:
    """The text of a prompt file, as it is; "-": standard input. Raises UserError when it cannot be read as UTF-8."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as e:
        raise UserError(f"prompt file {name} cannot be read: {e.strerror}") from e
    return decoded(content, f"prompt file {name}")
