"""What was measured: one JSON file a machine, written after every row, so that an interrupted run continues."""

import json
import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import save_json

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and extremes of theirs over ours, round by round: how many times as fast, where the values are times."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


class Results:
    """The rows measured on a machine, by name."""

    def __init__(self, path: Path, machine: Row, again: bool = False, minutes: float = 0) -> None:
        """Reads what is there already. again: measure every row anew, and replace it then; minutes: begin no row
        after that time; 0: no limit. Raises UserError when the file is not one of ours."""
        self.path, self.machine = path, machine
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        try:
            self.rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} holds no measurements that could be added to; move it away") from e
        self.stale = set(self.rows) if again else set()

    def missing(self, name: str) -> bool:
        """Whether the row is still to be measured; says so where it is not."""
        if name in self.rows and name not in self.stale:
            print(f"{name}: measured already; --again measures it anew", flush=True)
            return False
        if time.monotonic() > self.deadline:
            print(f"{name}: left out, the time is over; the same command goes on with it", flush=True)
            return False
        return True

    def put(self, name: str, row: Row) -> None:
        """Keeps a row, with the commit and the versions that it was measured with."""
        under = {"commit": commit(), "versions": self.machine["versions"], "flags": self.machine["flags"]}
        self.rows[name] = {**row, "under": under}
        self.stale.discard(name)
        self.path.parent.mkdir(exist_ok=True)
        machine = {key: value for key, value in self.machine.items() if key not in ("versions", "flags")}
        save_json(self.path, {"machine": machine, "rows": self.rows})


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it; empty outside of a repository."""
    command = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
