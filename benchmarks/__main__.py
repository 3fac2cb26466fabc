"""The same GPT in PyTorch and in JAX on this machine: python -m benchmarks [PART ...]

The parts, each runnable alone: train, decode, serve, load, tune, on a GPU largest, learn, variants, scale, startup and
data (all of them without a name, the most telling first), and report, which writes the documents' tables and the plots
from what was measured.
What has been measured already, with the same versions and flags, is not measured again, so an interrupted run
continues. A row that cannot be measured is reported, and the others go on; the exit status is 1 then.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data, decode, learn, load, machine, report, results, scale, serve, startup, train, tune, worker
from gpt_jax.errors import UserError

PARTS: dict[str, Callable[[results.Results, results.Row, Any], None]] = {
    "train": lambda measured, here, args: train.run(measured, here, args.rounds, args.preset),
    "decode": lambda measured, here, args: decode.run(measured, here, args.rounds, args.batch),
    "serve": lambda measured, here, args: serve.run(measured, here, args.rounds, args.gguf, args.llama_cpp),
    "load": lambda measured, here, args: load.run(
        measured, here, args.rounds, args.gguf, args.llama_cpp, args.models, args.rates
    ),
    "tune": lambda measured, here, args: tune.run(measured, here, args.rounds, args.conversations),
    "largest": lambda measured, here, args: train.run_largest(measured, here, args.rounds),
    "learn": lambda measured, here, args: learn.run(measured, here, args.rounds, path=args.text),
    "variants": lambda measured, here, args: train.run_variants(measured, here, args.rounds, args.preset),
    "scale": lambda measured, here, args: scale.run(measured, here, args.rounds),
    "startup": lambda measured, here, args: startup.run(measured, args.rounds, args.text),
    "data": lambda measured, here, args: data.run(
        measured, here, args.rounds, args.conversations, args.tokenizer, data.Sizes(memory=int(args.memory_gib * 2**30))
    ),
}
NAMES = (*PARTS, "report")


def rate(text: str) -> float:
    """A number of requests a second. Raises what argparse explains."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not possible: requests a second are more than 0")
    return value


def main(argv: Sequence[str]) -> int:
    """Runs the parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contestant (default: 3)")
    parser.add_argument("--preset", nargs="+", default=[], help="of train and variants: these presets only")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], help="of decode: sequences at a time")
    gguf = "of serve and load: GGUF files of a model, each to be compared with llama.cpp"
    parser.add_argument("--gguf", nargs="+", type=Path, default=[], metavar="FILE", help=gguf)
    programs = "of serve and load: where llama.cpp's programs are (default: PATH)"
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help=programs)
    models = "of load: where what is made of the models is looked for and kept (default: it is made anew)"
    parser.add_argument("--models", type=Path, metavar="FOLDER", help=models)
    rates = "of load: requests a second (default: 0.5 1 4)"
    parser.add_argument("--rates", nargs="+", type=rate, default=load.RATES, metavar="RATE", help=rates)
    chats = "conversations: of data, to pack beside docstrings; of tune, to tune on in their place"
    parser.add_argument("--conversations", nargs="+", type=Path, default=[], metavar="FILE", help=chats)
    published = "of data: a published tokenizer with ChatML's tokens to prepare them with, as its folder or GGUF file"
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help=published)
    gib = "of data: the source of the rows about memory (default: 2)"
    parser.add_argument("--memory-gib", type=float, default=2, metavar="GIB", help=gib)
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured already")
    limit = "begin nothing after this time, keep the whole rounds until then, end within two minutes (default: none)"
    parser.add_argument("--minutes", type=float, default=0, help=limit)
    text = "of learn and startup: the text (default: tiny Shakespeare, which is downloaded)"
    parser.add_argument("--text", type=Path, help=text)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    args = parser.parse_args(argv)
    try:
        failed = run(args)
    except KeyboardInterrupt:
        which = "without --again, the command" if args.again else "the same command"
        print(f"interrupted; what was measured is kept, and {which} goes on with what is missing", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, worker.FailedError, OSError) as e:
        error = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else str(e)
    else:
        error = f"not measured, for the reasons above: {', '.join(failed)}" if failed else ""
    if error:
        print(f"error: {error}", file=sys.stderr)
    return 1 if error else 0


def run(args: argparse.Namespace) -> list[str]:
    """Runs the parts that were asked for, in order of importance; returns the rows that could not be measured.

    Raises UserError for what was asked for and is not there.
    """
    chosen = args.parts or NAMES
    for part in chosen:
        if part not in NAMES:
            raise UserError(f"there is no part {part}; there are {', '.join(NAMES)}")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be 1 or more")
    if args.text and not args.text.is_file():
        raise UserError(f"--text {args.text}: there is no such file")
    for path in args.gguf:
        if not path.is_file():
            raise UserError(f"--gguf {path}: there is no such file")
    if args.minutes:
        worker.deadline = time.monotonic() + 60 * args.minutes
    failed: list[str] = []
    if compared := [part for part in PARTS if part in chosen]:
        here = machine.describe()
        measured = results.Results(args.out / machine.file_name(here), here, args.again)
        failed = measured.failed
        print(f"{here['name']}: {', '.join(f'{name} {version}' for name, version in here['versions'].items())}")
        for part in compared:
            print(f"== {part}", flush=True)
            PARTS[part](measured, here, args)
    if "report" in chosen:
        # Results elsewhere are not those that the documents' tables are written from.
        report.report(args.out, report.DOCUMENTS if args.out.resolve() == results.FOLDER.resolve() else ())
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
