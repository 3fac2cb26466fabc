"""`gpt-jax solve`: how many problems of an environment a model solves."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tyro

from gpt_jax.cli.parse import ModelArgs, Switch, parse
from gpt_jax.cli.terminal import print_json, print_table
from gpt_jax.config import ParallelConfig, check
from gpt_jax.data.shards import SplitName
from gpt_jax.environments.environment import Problems, open_environment
from gpt_jax.environments.judges import Judges
from gpt_jax.errors import UserError
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.system import available_cores

if TYPE_CHECKING:
    from gpt_jax.evaluate.solve import Answered

GREEDY = Settings(filters=Filters(temperature=0.0, top_p=1.0))


@dataclass(frozen=True)
class SolveArgs(ModelArgs):
    """Tell how many problems of an environment a GPT solves. The same arguments and seed give the same answers."""

    environment: str = ""  # arithmetic, reasoning-gym:TASK, problems, MODULE:NAME, FILE.py:NAME; docs/post-training.md.
    options: tuple[str, ...] = ()  # Its options, NAME=VALUE.
    data: str = ""  # With --environment problems: the folder of the prepared set.
    split: SplitName = "val"  # Problems to learn from (train), or held out (val).
    n_problems: int = 200  # The first problems of the split, at most.
    num_samples: int = 1  # Answers to each problem, of which pass@k counts; they differ with a temperature above 0.
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=lambda: GREEDY)
    slots: int = 64  # Answers that each device writes at the same time; on a mesh, each data part of it.
    judges: int = 0  # Processes that judge answers; 0: one for each core but one.
    judge_timeout: float = 60.0  # Seconds after which a reward is given up.
    show: int = 0  # Answers to print, of the first problems.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    json: Switch = False  # Print one JSON object.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_problems", "num_samples", "slots"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("judges", "show"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        check(self.judge_timeout > 0, "judge_timeout", self.judge_timeout, "more than 0")
        if not self.environment:
            raise UserError("name what gives problems and rewards by --environment, such as arithmetic")
        same = self.num_samples > 1 and self.settings.filters.temperature == 0
        check(not same, "num_samples", self.num_samples, "1 with --temperature 0, where all answers are the same")


def command(argv: Sequence[str]) -> int:
    """Loads a model, lets it answer problems, and prints how many are right."""
    args = parse(SolveArgs, argv, "solve")
    problems = Problems(open_environment(args.environment, args.options, args.data), args.environment)
    n = min(args.n_problems, problems.count(args.split))

    from gpt_jax import runtime
    from gpt_jax.evaluate.solve import answer_problems
    from gpt_jax.placement import choose_placement
    from gpt_jax.run.load import config_to_load, load_model
    from gpt_jax.sample.rollouts import EVALUATION, Rollouts

    source = args.source()
    runtime.setup(args.parallel.n_asked or 1)
    devices = runtime.choose_devices(args.parallel)
    if not args.parallel.n_asked:
        devices = devices[: -(-n * args.num_samples // args.slots)]
    placement = choose_placement(args.parallel, config_to_load(source, args.context_length), devices)
    model, params, tokenizer = load_model(source, args.context_length, placement)
    T, new = model.config.context_length, args.settings.max_new_tokens
    check(new <= T, "max_new_tokens", new, f"at most the context of {T} tokens")
    rollouts = Rollouts(model, placement, tokenizer, args.settings.seed, n * args.num_samples, args.slots)
    n_judges = args.judges or max(1, available_cores() - 1)
    with Judges(args.environment, args.options, args.data, n_judges, args.judge_timeout) as judges:
        asked = rollouts, params, problems, judges, args.split, range(n)
        found = list(answer_problems(*asked, args.num_samples, args.settings, T + 1 - new, EVALUATION))
    if not found:
        raise UserError(f"no problem has a prompt that leaves room for {new} new tokens; shorten --max-new-tokens")
    for answers in found[: args.show]:
        one = answers[0]
        prompt = tokenizer.decode(one.row.result.prompt_tokens)
        print(f"--- problem {one.number}\n{prompt}{one.row.result.text}\n--- reward {one.reward:g}", file=sys.stderr)
    numbers = report(found, n)
    if args.json:
        given = {"model": args.model or source.where, "environment": args.environment, "options": list(args.options)}
        print_json({**given, "split": args.split, **numbers})
    else:
        print_table(table(args, numbers), 18)
    return 0


def report(found: "Sequence[Sequence[Answered]]", n_asked: int) -> dict[str, Any]:
    """The numbers of an evaluation by name."""
    from gpt_jax.evaluate.solve import SOLVED, interval, pass_at_k

    k = len(found[0])
    right = [sum(one.reward >= SOLVED for one in answers) for answers in found]
    low, high = interval([n_right / k for n_right in right])
    results = [one.row.result for answers in found for one in answers]
    passes = {f"pass@{j}": sum(pass_at_k(k, n, j) for n in right) / len(right) for j in dict.fromkeys((1, k))}
    return {
        "reward": sum(one.reward for answers in found for one in answers) / len(results),
        **passes,
        "pass@1_low": low,
        "pass@1_high": high,
        "problems": len(found),
        "too_long": n_asked - len(found),
        "answers": len(results),
        "answer_tokens": sum(len(result.tokens) for result in results) / len(results),
        "overlong": sum(result.finish_reason == "length" for result in results) / len(results),
    }


def table(args: SolveArgs, numbers: dict[str, Any]) -> dict[str, str]:
    """The report as a table of names and texts."""
    k, n = args.num_samples, f"{numbers['problems']:,} problems of {args.split}"
    rows = {
        "environment": f"{' '.join((args.environment, *args.options))}: {n}, answers to each: {k}",
        f"pass@{k}": f"{numbers[f'pass@{k}']:.1%}",
        # Where k is 1, these are the same row.
        "pass@1": f"{numbers['pass@1']:.1%} (95%: {numbers['pass@1_low']:.1%} to {numbers['pass@1_high']:.1%})",
        "reward": f"{numbers['reward']:.4f}",
        "answers": f"{numbers['answer_tokens']:.1f} tokens; {numbers['overlong']:.1%} were cut",
    }
    if numbers["too_long"]:
        rows["too long"] = f"{numbers['too_long']} problems"
    return rows
