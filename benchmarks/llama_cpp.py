"""llama.cpp as a contestant, by its own benchmarks: llama-bench for one sequence, llama-batched-bench for several."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import run_command
from benchmarks.worker import FailedError

PROGRAMS = ("llama-bench", "llama-batched-bench")
SERVER = ("llama-server", "llama-quantize")
"""The programs for benchmarks of a file, and those for serving it in other types."""


def find_programs(folder: Path | None, names: Sequence[str] = PROGRAMS) -> dict[str, str]:
    """The programs by name, as far as they are in a folder, or on PATH where none is given."""
    where = None if folder is None else str(folder.absolute())
    found = {name: shutil.which(name, path=where) for name in names}
    return {name: path for name, path in found.items() if path}


def seconds(programs: dict[str, str], gguf: str, threads: int, batch: int, prompt: int, new: int) -> float:
    """Seconds of reading a prompt where there is one new token, and else of so many new ones in each sequence.

    Raises FailedError when the program fails, or says something else.
    """
    options = ["-m", gguf, "-t", str(threads)]
    if batch == 1:
        n_read, n_new = (prompt, 0) if new == 1 else (0, new)
        options += ["-p", str(n_read), "-n", str(n_new), "-r", "1", "-o", "json"]
        done = run_command(*options, program=programs["llama-bench"])
        text, figure, unit = "\n".join(line for _, line in done.lines), "avg_ns", 1e-9
    else:
        places = batch * (prompt + new)
        options += ["-c", str(places), "-npp", str(prompt), "-ntg", str(new), "-npl", str(batch)]
        done = run_command(*options, "--output-format", "jsonl", program=programs["llama-batched-bench"])
        lines = [line for _, line in done.lines if line.startswith("{")]
        text, figure, unit = f"[{','.join(lines)}]", "t_tg", 1.0
    try:
        [found] = json.loads(text)
        return unit * float(found[figure])
    except (ValueError, TypeError, KeyError) as e:
        raise FailedError(f"its benchmark says nothing of {figure}") from e
