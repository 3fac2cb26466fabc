"""Time from starting train.py to the end of its first step: python -m benchmarks.startup --data-dir DIR [--rounds 3]

Cold: with an empty compile cache. Warm: with the one that the cold start filled. The configuration is
configs/shakespeare_char_cpu.py, the data any prepared folder. Writes benchmarks/results/startup.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpt_jax.files import save_json

ROOT = Path(__file__).parent.parent


def seconds_to_first_step(data: Path, cache: Path, out: Path) -> float:
    """Starts train.py, waits until it reports its first step, and ends it."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", "configs/shakespeare_char_cpu.py", f"--data.dir={data}", f"--out-dir={out}"],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("first step:"):
            seconds = time.perf_counter() - begin
            process.kill()
            process.communicate()
            return seconds
    raise RuntimeError("train.py ended before its first step")


def main() -> None:
    """Measures both, a cold start and then a warm one in every round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=lambda path: Path(path).absolute(), required=True, help="a prepared folder")
    parser.add_argument("--rounds", type=int, default=3, help="cold and warm starts")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, values in seconds.items():
                values.append(seconds_to_first_step(args.data_dir, Path(folder) / "cache", Path(folder) / kind))
                print(f"round {turn + 1}: {kind} {values[-1]:.1f} s", flush=True)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(", ".join(f"{kind} {median:.1f} s" for kind, median in medians.items()))
    save_json(Path(__file__).parent / "results" / "startup.json", {"seconds": seconds, "medians": medians})


if __name__ == "__main__":
    main()
