"""The same GPT in PyTorch and in JAX on this machine: python -m benchmarks [PART ...]

Parts, each runnable alone: train, decode, learn, variants, scale, on a GPU largest (all of them without a name), and
report, which writes the README's tables and the plots from what was measured. What has been measured already is not
measured again, so an interrupted run continues.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import decode, learn, machine, report, results, scale, train
from gpt_jax.errors import UserError

README = Path(__file__).parent.parent / "README.md"


def main(argv: Sequence[str]) -> int:
    """Runs the parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="train, decode, learn, largest, variants, scale, report"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contestant (default: 3)")
    parser.add_argument("--preset", nargs="+", default=[], help="of train and variants: these presets only")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], help="of decode: sequences at a time")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured already")
    parser.add_argument(
        "--minutes", type=float, default=0, help="begin no measurement after this time (default: no limit)"
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run(args: argparse.Namespace) -> None:
    """Runs the parts that were asked for, in order of importance. Raises UserError."""
    chosen = args.parts or list(PARTS) + ["report"]
    unknown = [part for part in chosen if part not in (*PARTS, "report")]
    if unknown:
        raise UserError(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}, report")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be 1 or more")
    measured = [part for part in PARTS if part in chosen]
    if measured:
        here = machine.describe()
        measurements = results.Results(args.out / machine.file_name(here), here, args.again, args.minutes)
        print(f"{here['name']}: {', '.join(f'{name} {version}' for name, version in here['versions'].items())}")
        for part in measured:
            print(f"== {part}", flush=True)
            PARTS[part](measurements, here, args)
    if "report" in chosen:
        report.report(args.out, README)


PARTS: dict[str, Callable[[results.Results, results.Row, argparse.Namespace], None]] = {
    "train": lambda measured, here, args: train.run(measured, here, args.rounds, tuple(args.preset)),
    "decode": lambda measured, here, args: decode.run(measured, here, args.rounds, tuple(args.batch)),
    "learn": lambda measured, here, args: learn.run(measured, here, args.rounds),
    "largest": lambda measured, here, args: train.run_largest(measured, here, args.rounds),
    "variants": lambda measured, here, args: train.run_variants(measured, here, args.rounds, tuple(args.preset)),
    "scale": lambda measured, here, args: scale.run(measured, here, args.rounds),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
