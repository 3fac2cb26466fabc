"""Commands that are killed at any time, and what is there afterwards: `python -m tests.soak [--kills 200] [--seed 0]`.

Preparing data, training (which prepares its own data first), resuming and exporting are started as a user does, and end
by SIGKILL: half of them after a time that is drawn from how long the command takes, half of them in a phase that the
files show, such as the writing of a checkpoint. After each one:

- a folder of data, or an exported model, is the older one or the new one, byte for byte, or was not there before;
- a run has its latest checkpoint still, and that can be read;
- the next command, which may be killed as well, says nothing of damage, and one that is left alone succeeds.

A run that came to its end has the metrics, and the checksums of parameters and optimizer state, of one that was never
interrupted. One line is printed for each kill, and a table at the end; the exit status is 1 when anything was wrong.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_jax import runtime
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.load import load_model, open_run
from tests.commands import ROOT, TINY, records

LANES = 2
"""Commands at one time, each in a folder of its own."""

STEPS = 200
PREPARING = ["--tokenizer=sentencepiece", "--vocab-size=400"]
TRAINING = [
    *TINY,
    "--data.vocab-size=400",
    f"--train.steps={STEPS}",
    "--train.eval-every=50",
    "--train.checkpoint-every=10",
    "--model.dropout=0.1",
    "--parallel.devices=1",
]


class FaultError(Exception):
    """Something was lost, or is not as it should be."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise FaultError(what)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name; empty when it is not there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def latest(run: Path) -> int:
    """The last step with a complete checkpoint; 0 when there is none."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def outcome(run: Path) -> list[Any]:
    """All that a run logged, but for how long it took, and the checksums of its last checkpoint."""
    logged = [(r["step"], r["loss"], r["lr"], r["grad_norm"], r["tokens"], r.get("val_loss")) for r in records(run)]
    meta = run / "checkpoints" / str(STEPS) / "meta" / "metadata"
    return [*logged, json.loads(meta.read_text())["checksums"]]


@dataclass
class Ended:
    """A command that ended by itself (killed_in is empty) or was killed."""

    killed_in: str
    seconds: float


Phases = dict[str, Callable[[], bool]]
"""Whether a command is in a phase now, by the phase's name; the later ones count."""


@dataclass
class Lane:
    """Runs commands one after the other in a folder, with a compile cache of its own."""

    folder: Path
    rng: random.Random
    lasts: dict[str, float] = field(default_factory=dict)
    """Seconds that each command took the last time that it was not interrupted."""

    def run(self, args: list[object], phases: Phases, kill_after: float | None = None, kill_in: str = "") -> Ended:
        """Runs a command, to its end or until it is killed: after a time, or in a phase."""
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        with (self.folder / "output").open("wb") as output:  # Not a pipe: the next command waits for no worker's end.
            start = time.monotonic()
            command = [sys.executable, "-m", "gpt_jax", *map(str, args)]
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)
            killed_in = ""
            while process.poll() is None:
                seconds = time.monotonic() - start
                expect(seconds < 600, f"{args[0]} takes more than ten minutes")
                phase = next((name for name, is_in in reversed(phases.items()) if is_in()), "start")
                if phase == kill_in or (kill_after is not None and seconds >= kill_after):
                    if kill_in:
                        time.sleep(self.rng.choice([0, 0.02 * self.rng.random()]))  # Some phases are as short.
                    killed_in = phase
                    process.kill()
                    process.wait()
                    break
                time.sleep(0.001)
        said = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        for word in ("Traceback", "damaged", "error:"):
            expect(word not in said, f"{args[0]} says: {said[-2000:]}")
        if process.returncode != -9:
            killed_in = ""
            expect(process.returncode == 0, f"{args[0]} ends with {process.returncode}: {said[-2000:]}")
        return Ended(killed_in, time.monotonic() - start)

    def until_killed(self, kind: str, args: list[object], phases: Phases) -> Ended:
        """Kills a command after a random time, or in a random phase."""
        if self.rng.random() < 0.5:
            ended = self.run(args, phases, kill_after=self.rng.random() * self.lasts[kind])
        else:
            ended = self.run(args, phases, kill_in=self.rng.choice(list(phases)))
        if not ended.killed_in:
            self.lasts[kind] = ended.seconds
        return ended


@dataclass
class Folder:
    """A folder that a command makes whole or not at all, in one of two forms, in turn."""

    kind: str  # The command.
    out: Path
    commands: list[list[object]]  # For each form.
    contents: list[dict[str, bytes]] = field(default_factory=list)  # Of each form, made without interruption.
    turn: int = 0

    @property
    def beside(self) -> list[Path]:
        """What a killed process may leave."""
        return [self.out.with_name(f".{self.out.name}.{name}") for name in ("partial", "old")]

    @property
    def phases(self) -> Phases:
        partial, old = self.beside
        return {
            "writing": lambda: partial.is_dir() and any(partial.iterdir()),
            "moving": old.exists,
        }

    def try_once(self, lane: Lane) -> Ended:
        """Makes the next form, killed or not, and looks at what is there then."""
        before = content(self.out)
        self.turn += 1
        form = self.turn % 2
        again = ["--force"] if self.out.exists() else []
        ended = lane.until_killed(self.kind, [*self.commands[form], *again], self.phases)
        now = content(self.out)
        if ended.killed_in:
            at_hand = now or content(self.beside[1])  # The next command puts that one back.
            expect(at_hand in (before, self.contents[form]), f"{self.out} is neither the older nor the new one")
        else:
            self.check_made(form)
        return ended

    def make(self, lane: Lane) -> Ended:
        """Makes the next form without interruption."""
        self.turn += 1
        form = self.turn % 2
        again = ["--force"] if self.out.exists() or self.beside[1].exists() else []
        ended = lane.run([*self.commands[form], *again], self.phases)
        self.check_made(form)
        return ended

    def check_made(self, form: int) -> None:
        expect(content(self.out) == self.contents[form], f"{self.out} is not what it should be")
        expect(not any(path.exists() for path in self.beside), f"there are leftovers beside {self.out}")


@dataclass
class Run:
    """A training run that is resumed until it comes to its end, and then begun anew."""

    lane: Lane
    corpus: Path
    expected: list[Any]
    expected_data: dict[str, bytes]

    @property
    def out(self) -> Path:
        return self.lane.folder / "run"

    @property
    def data(self) -> Path:
        return self.lane.folder / "run-data"

    @property
    def kind(self) -> str:
        return "resume" if (self.out / "config.json").exists() else "train"

    def args(self) -> list[object]:
        if self.kind == "resume":
            return ["train", "--resume", "--out-dir", self.out]
        return ["train", *TRAINING, "--out-dir", self.out, "--data.dir", self.data, "--data.source", self.corpus]

    def phases(self) -> Phases:
        metrics, partial = self.out / "metrics.jsonl", self.data.with_name(f".{self.data.name}.partial")

        def file() -> tuple[int, int]:
            """Each process makes its own, with the older records, before it compiles."""
            return (metrics.stat().st_ino, metrics.stat().st_size) if metrics.exists() else (0, 0)

        (older, _), opened = file(), [0]

        def compiling() -> bool:
            which, size = file()
            if which != older and not opened[0]:
                opened[0] = size + 1
            return opened[0] > 0

        def training() -> bool:
            return compiling() and file()[1] >= opened[0]

        def saving() -> bool:
            return training() and any((self.out / "checkpoints").glob("*.orbax-*"))

        begun: Phases = {"compiling": compiling, "training": training, "saving": saving}
        return begun if self.data.exists() else {"preparing": partial.exists} | begun

    def try_once(self) -> Ended:
        before, had_data = latest(self.out), self.data.exists()
        ended = self.lane.until_killed(self.kind, self.args(), self.phases())
        if had_data or self.data.exists():
            expect(content(self.data) == self.expected_data, f"{self.data} is not what it should be")
        expect(latest(self.out) >= before, f"checkpoint {before} is lost")
        if latest(self.out):
            load_model(open_run(RunFolder(self.out)))  # Compares the parameters with their checksums.
        if not ended.killed_in:
            self.check_end()
        return ended

    def finish(self) -> Ended:
        ended = self.lane.run(self.args(), self.phases())
        self.check_end()
        return ended

    def check_end(self) -> None:
        """Compares a run that came to its end, and clears it away."""
        ours = outcome(self.out)
        different = [str(pair) for pair in zip(ours, self.expected, strict=False) if pair[0] != pair[1]]
        expect(ours == self.expected, f"a resumed run differs: {len(ours)} entries, {different[:2]}")
        expect(not list((self.out / "checkpoints").glob("*.orbax-*")), "there are leftovers of checkpoints")
        shutil.rmtree(self.out)
        shutil.rmtree(self.data)
        if self.lane.rng.random() < 0.5:
            shutil.rmtree(self.lane.folder / "cache")  # The next one compiles anew.


def main() -> int:
    """Kills as many commands as asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="commands to kill")
    parser.add_argument("--seed", type=int, default=0, help="decides what is killed and when")
    args = parser.parse_args()
    runtime.setup()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    corpora = []
    for i in range(2):
        letters = "".join(random.Random(i).choices("etaoinshrdlu语言  \n", k=2_000_000))
        corpora.append(root / f"corpus-{i}.txt")
        corpora[-1].write_text(letters, encoding="utf-8")

    lanes = [Lane(root / f"lane-{i}", random.Random(f"{args.seed} {i}")) for i in range(LANES)]
    kinds: list[list[Any]] = []
    first = lanes[0]
    for lane in lanes:
        lane.folder.mkdir()
        lane.lasts = first.lasts  # Measured once.
        data = Folder(
            "prepare",
            lane.folder / "data",
            [["prepare", corpus, "--out", lane.folder / "data", *PREPARING] for corpus in corpora],
        )
        export = Folder(
            "export",
            lane.folder / "exported",
            [
                ["export", "--run", root / "run", "--checkpoint", step, "--out", lane.folder / "exported"]
                for step in (STEPS, STEPS - 10)
            ],
        )
        kinds.append([data, export])

    print(f"in {root}")
    reference = [
        "train",
        *TRAINING,
        "--out-dir",
        root / "run",
        "--data.dir",
        root / "run-data",
        "--data.source",
        corpora[0],
    ]
    first.lasts["train"] = first.run(reference, {}).seconds
    first.lasts["resume"] = first.lasts["train"]
    for made in kinds[0]:
        for command in made.commands:
            first.lasts[made.kind] = first.run(command, {}).seconds
            made.contents.append(content(made.out))
            shutil.rmtree(made.out)
    for lane_kinds in kinds[1:]:
        for made, same in zip(lane_kinds, kinds[0], strict=True):
            made.contents = same.contents
    for lane, lane_kinds in zip(lanes, kinds, strict=True):
        lane_kinds.append(Run(lane, corpora[0], outcome(root / "run"), content(root / "run-data")))
    print("uninterrupted: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in first.lasts.items()), flush=True)

    killed: Counter[tuple[str, str]] = Counter()
    completed: Counter[str] = Counter()
    faults: list[str] = []

    def work(lane: Lane, kinds: list[Any]) -> None:
        try:
            while killed.total() < args.kills and not faults:
                thing = lane.rng.choices(kinds, weights=(1, 1, 3))[0]
                kind = thing.kind
                ended = thing.try_once(lane) if isinstance(thing, Folder) else thing.try_once()
                if not ended.killed_in:
                    completed[kind] += 1
                    continue
                killed[kind, ended.killed_in] += 1
                step = f", latest checkpoint {latest(thing.out)}" if isinstance(thing, Run) else ""
                where = f"killed after {ended.seconds:5.2f} s, {ended.killed_in}{step}"
                print(f"{killed.total():4} {lane.folder.name} {kind:<8} {where}", flush=True)
                if lane.rng.random() < 0.3:  # In the other cases, the next command may be killed as well.
                    after = thing.make(lane) if isinstance(thing, Folder) else thing.finish()
                    completed[kind] += 1
                    print(
                        f"     {lane.folder.name} {thing.kind:<8} came to its end in {after.seconds:.2f} s", flush=True
                    )
            for thing in kinds:
                if isinstance(thing, Folder):
                    thing.make(lane)
                elif thing.kind == "resume":
                    thing.finish()
        except Exception as e:  # A checkpoint that cannot be read, too.
            faults.append(f"{lane.folder.name}: {e}")
            print(f"FAULT in {faults[-1]}", flush=True)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(lanes, kinds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{'command':<10}{'phase':<12}{'kills':>6}")
    for (kind, phase), n in sorted(killed.items()):
        print(f"{kind:<10}{phase:<12}{n:>6}")
    print(f"{killed.total()} kills, {completed.total()} commands that came to their end, {len(faults)} faults")
    if not faults:
        shutil.rmtree(root)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
