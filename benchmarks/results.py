"""What was measured: one JSON file a machine, written after every row, so that an interrupted run continues."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.worker import FailedError, OutOfTimeError, time_is_over
from gpt_jax.errors import UserError
from gpt_jax.storage.files import save_json

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


class Results:
    """The rows measured on a machine, by name."""

    def __init__(self, path: Path, machine: Row, again: bool = False) -> None:
        """Reads what is there already. again: measure every row anew, and replace it then. Raises UserError when the
        file is not one of ours."""
        self.path = path
        try:
            self.rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} holds no measurements that could be added to; move it away") from e
        self.stale = set(self.rows) if again else set()
        self.failed: list[str] = []
        of_machine = {key: value for key, value in machine.items() if key not in ("versions", "flags")}
        self.under: Row = {"versions": machine["versions"], "flags": machine["flags"], "machine": of_machine}
        """What a row is measured with: versions, flags, and all else that is known of the machine."""

    def measure(self, name: str, line: str, make: Callable[..., Row], *arguments: Any) -> None:
        """Keeps the row that `make(*arguments)` measures, unless it is there; `line` says what it is.

        What keeps it from being measured is printed in one line, the name goes into `failed`, and the caller goes on.
        """
        if not self.missing(name):
            return
        print(f"{name}: {line}", flush=True)
        try:
            self.put(name, make(*arguments))
        except OutOfTimeError:
            print(f"{name}: left out, the time was over before a whole round", flush=True)
        except (UserError, FailedError) as e:
            print(f"{name}: not measured: {e}", flush=True)
            self.failed.append(name)

    def missing(self, name: str) -> bool:
        """Whether the row is still to be measured; says so where it is not, and where it is to be measured anew."""
        is_known = name in self.rows and name not in self.stale
        changed = self.changed(name) if is_known else ""
        if is_known and not changed:
            print(f"{name}: measured already; --again measures it anew", flush=True)
            return False
        if time_is_over():
            print(f"{name}: left out, the time is over; the same command goes on with it", flush=True)
            return False
        if changed:
            print(f"{name}: measured anew, because it was measured with {changed}", flush=True)
        return True

    def changed(self, name: str) -> str:
        """What a row was measured with and is not there now, in a few words; empty where all is the same."""
        before = self.rows[name].get("under", {})
        for kind, now in self.under.items():
            was = before.get(kind, {})
            for key in (*now, *was):
                if was.get(key) != now.get(key):
                    return f"{key} {was.get(key, 'not recorded')}, and it is {now.get(key, 'not there')} now"
        return ""

    def put(self, name: str, row: Row) -> None:
        """Keeps a row, with the commit and what it was measured with."""
        self.rows[name] = {**row, "under": {"commit": commit(), **self.under}}
        self.stale.discard(name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_json(self.path, {"machine": self.under["machine"], "rows": self.rows})


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it, other than what is measured and where
    its tables stand; empty outside of a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(FOLDER.parent.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        written = (":!benchmarks/results", ":!README.md", ":!docs/speed.md")
        differs = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "--short", "HEAD") + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
