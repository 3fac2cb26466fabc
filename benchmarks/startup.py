"""From starting a command to its first training step: python -m benchmarks startup [--text PATH]"""

import tempfile
from pathlib import Path

from benchmarks.measure import run_command, spread
from benchmarks.results import Results, Row


def run(results: Results, rounds: int, text: Path | None) -> None:
    """Measures the row, unless it is there already. text: in place of tiny Shakespeare."""
    line = "train.py with configs/shakespeare_char_cpu.py, to its first step"
    results.measure("startup/shakespeare-char", line, start, rounds, text)


def start(rounds: int, text: Path | None) -> Row:
    """The row: with an empty compile cache, and with the one that this start filled."""
    seconds: dict[str, list[float]] = {"empty compile cache": [], "warm compile cache": []}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        run_command("-m", "gpt_jax", "prepare", str(text or "shakespeare"), "--out", data, "--model-type", "char")
        train = ("train.py", "configs/shakespeare_char_cpu.py", f"--data.dir={data}")
        for turn in range(rounds):
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache-{turn}"}
            for kind, values in seconds.items():
                out = f"--out-dir={folder}/{len(values)}-{kind.split()[0]}"
                values.append(run_command(*train, out, environment=cache, until="first step:").lines[-1][0])
                print(f"  round {turn + 1}: {kind} {values[-1]:.1f} s", flush=True)
    contestants = {kind: {"seconds": spread(values)} for kind, values in seconds.items()}
    return {"rounds": rounds, "contestants": contestants, "failed": {}, "notes": []}
