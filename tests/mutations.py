"""Small changes to the core, one at a time, that the tests should notice: `python -m tests.mutations [NAME...]`.

Each entry of mutations.txt is a name, a file, the lines to replace (-), the lines in their place (+) and the tests that
should fail then. The old text must be in the file exactly once: an entry that is stale is an error, and so is a test
that is not there, or that fails without any change. An entry with a reason (=) changes nothing that could be noticed.

The tree is copied, and changed in the copy only. Prints what each change led to, and how long that took; the exit
status is 1 when a change was not noticed and has no reason, or an entry is wrong. NAME: a part of the names to try.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gpt_jax.system import available_cores

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".txt")
TIMEOUT = 300
"""Seconds after which tests that were changed into ones without an end count as failed."""

GOOD = ("noticed", "changes nothing")


@dataclass
class Mutation:
    """An entry of the list, of which the tests are pytest's node ids."""

    name: str
    file: str = ""
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reason: str = ""
    tests: list[str] = field(default_factory=list)


def read_list(text: str) -> list[Mutation]:
    """The entries of a list; their groups, in lines that begin with one #, are for people."""
    mutations: list[Mutation] = []
    for line in text.splitlines():
        kind, rest = line[:2], line[2:]
        if line.startswith("## "):
            mutations.append(Mutation(line[3:]))
        elif kind in ("- ", "+ ", "-", "+"):
            (mutations[-1].old if kind[0] == "-" else mutations[-1].new).append(rest)
        elif kind == "= ":
            mutations[-1].reason = rest
        elif line.startswith("tests/"):
            mutations[-1].tests.append(line)
        elif line and kind != "# ":
            mutations[-1].file = line
    return mutations


def changed(mutation: Mutation, root: Path) -> str | None:
    """The content of the file after the change; None when its old text is not there once."""
    path = root / mutation.file
    before, old = path.read_text(encoding="utf-8") if path.is_file() else "", "\n".join(mutation.old)
    return before.replace(old, "\n".join(mutation.new)) if old and before.count(old) == 1 else None


def copy_tree(folder: Path) -> Path:
    """A copy of the files that git has or would take: the tree without what was compiled or built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, stdout=-1, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def pytest_status(root: Path, tests: list[str], timeout: float | None = TIMEOUT) -> tuple[int, str]:
    """pytest's exit status for these tests in a copy, and what it printed; 1 when they take too long."""
    # Compiled modules are told from their sources by size and seconds, which are often the same after a change.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "--no-header", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, stdout=-1, stderr=-2, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return 1, "the tests took too long"
    return done.returncode, done.stdout


def outcome(mutation: Mutation, root: Path) -> tuple[str, str]:
    """What a change led to, in words, and what pytest printed."""
    content = changed(mutation, root)
    if content is None:
        return "STALE", "the old text is not in the file, or more than once"
    path = root / mutation.file
    before = path.read_bytes()
    path.write_text(content, encoding="utf-8")
    try:
        status, printed = pytest_status(root, mutation.tests)
    finally:
        path.write_bytes(before)
    if status not in (0, 1):  # Tests that are not there, or cannot be imported.
        return "BROKEN", printed
    if mutation.reason:
        return ("changes nothing", "") if status == 0 else ("NOTICED, BUT SAID TO CHANGE NOTHING", printed)
    return ("noticed", "") if status == 1 else ("NOT NOTICED", printed)


def main() -> int:
    """Tries the mutations whose names hold one of the arguments, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of the names to try; none: all of them")
    parser.add_argument("--workers", type=int, default=available_cores(), help="tried at one time, each in a copy")
    args = parser.parse_args()
    mutations = [
        m for m in read_list(LIST.read_text(encoding="utf-8")) if not args.names or any(n in m.name for n in args.names)
    ]
    if not mutations:
        parser.error(f"{LIST.name} has no name that holds {' or '.join(args.names)}")
    waiting: queue.Queue[Mutation] = queue.Queue()
    results: list[tuple[Mutation, str, float]] = []

    def work(root: Path) -> None:
        while True:
            try:
                mutation = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            what, printed = outcome(mutation, root)
            results.append((mutation, what, time.monotonic() - start))
            print(f"{len(results):3} {what:<15} {results[-1][2]:5.0f} s  {mutation.name}", flush=True)
            if what not in GOOD:
                print("\n".join(f"        {line}" for line in printed.splitlines()[-15:]), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        roots = [copy_tree(Path(folder) / str(i)) for i in range(args.workers)]
        start = time.monotonic()
        status, printed = pytest_status(roots[0], sorted({test for m in mutations for test in m.tests}), timeout=None)
        print(
            f"without any change: {'passed' if status == 0 else printed} ({time.monotonic() - start:.0f} s)", flush=True
        )
        if status:
            return 1
        for mutation in mutations:
            waiting.put(mutation)
        threads = [threading.Thread(target=work, args=(root,)) for root in roots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    counts = Counter(what for _, what, _ in results)
    print(f"{len(results)} changes in {time.monotonic() - start:.0f} s: ", end="")
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))
    for mutation, what, _ in sorted(results, key=lambda result: mutations.index(result[0])):
        if what != "noticed":
            print(f"  {what}: {mutation.name}{f' ({mutation.reason})' if mutation.reason else ''}")
    return int(any(what not in GOOD for what in counts) or len(results) < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
