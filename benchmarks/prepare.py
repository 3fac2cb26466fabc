"""How fast `prepare` is, and how much memory it takes: python -m benchmarks.prepare [--gib 1]

The corpus is the built-in python-docs over and over as JSON Lines, each time with one word in twenty replaced by one
that was never seen: otherwise the cache of words would know all of it. That share is an assumption; text that brings
fewer new words is tokenised faster, text that brings more is tokenised slower. `prepare` runs as a process of its own;
every 0.1 s the memory of it and of its workers is added up. SentencePiece alone encodes the first 64 MiB with the same
model, on one core.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece

from gpt_jax.data.corpora import python_docs
from gpt_jax.data.shards import load_meta
from gpt_jax.files import save_json
from gpt_jax.system import available_cores

ALONE_BYTES = 64 << 20
RESULTS = Path(__file__).parent / "results" / "prepare.json"


def write_corpus(path: Path, n_bytes: int) -> None:
    """JSON Lines of `n_bytes` or a little more."""
    rng = random.Random(0)
    documents = [document.split(" ") for document in python_docs()]
    with path.open("w", encoding="utf-8") as f:
        while f.tell() < n_bytes:
            for document in documents:
                words = document.copy()
                for i in rng.choices(range(len(words)), k=len(words) // 20):
                    words[i] = f"{rng.getrandbits(40):x}".translate(HEX_TO_LETTERS)
                f.write(json.dumps({"text": " ".join(words)}) + "\n")


HEX_TO_LETTERS = str.maketrans("0123456789abcdef", "etaoinshrdlucmfw")


def memory_of_tree(root: int) -> list[int]:
    """Resident bytes of a process and of all below it. Pages that they share are counted in each."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            resident[int(process.name)] = int((process / "statm").read_text().split()[1]) * resource.getpagesize()
            parents[int(process.name)] = int(fields[1])
        except OSError:  # It has just ended.
            continue
    tree = {root}
    while found := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= found
    return [resident[pid] for pid in tree if pid in resident]


def run_prepare(corpus: Path, out: Path) -> dict[str, float]:
    """Runs `prepare` as a process and measures it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gpt_jax", "prepare", str(corpus), "--out", str(out)])
    peak_sum = peak_process = 0
    while process.poll() is None:
        sizes = memory_of_tree(process.pid)
        peak_sum, peak_process = max(peak_sum, sum(sizes)), max([peak_process, *sizes])
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    meta = load_meta(out)
    return {
        "seconds": seconds,
        "text_bytes": meta.train.bytes + meta.val.bytes,
        "tokens": meta.train.tokens + meta.val.tokens,
        "mb_per_second": (meta.train.bytes + meta.val.bytes) / 1e6 / seconds,
        "tokens_per_second": (meta.train.tokens + meta.val.tokens) / seconds,
        "cores_busy": cpu_seconds / seconds,
        "peak_mib_all_processes": peak_sum / 2**20,
        "peak_mib_largest_process": peak_process / 2**20,
    }


def run_alone(corpus: Path, model: Path) -> dict[str, float]:
    """SentencePiece itself on one core, document after document; only encoding is timed."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    documents: list[str] = []
    n_bytes = 0
    with corpus.open(encoding="utf-8") as f:
        while n_bytes < ALONE_BYTES and (line := f.readline()):
            documents.append(json.loads(line)["text"])
            n_bytes += len(documents[-1].encode())
    start = time.perf_counter()
    tokens = sum(len(processor.encode(document)) for document in documents)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "text_bytes": n_bytes,
        "tokens": tokens,
        "mb_per_second": n_bytes / 1e6 / seconds,
        "tokens_per_second": tokens / seconds,
    }


def main() -> None:
    """Measures, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description="Measure the speed and the memory of prepare.")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus in GiB (default: 1)")
    gib = parser.parse_args().gib
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        write_corpus(corpus, int(gib * 2**30))
        prepared = run_prepare(corpus, out)
        alone = run_alone(corpus, out / "tokenizer.model")
    result = {
        "command": f"python -m benchmarks.prepare --gib {gib:g}",
        "machine": {"cpu": cpu_name(), "cores": available_cores(), "python": platform.python_version()},
        "prepare": prepared,
        "sentencepiece_alone_on_one_core": alone,
        "times_as_fast": prepared["tokens_per_second"] / alone["tokens_per_second"],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    save_json(RESULTS, result)
    print(f"{'':<34}{'MB/s':>8}{'tokens/s':>14}{'cores busy':>12}{'peak memory':>14}")
    print(
        f"{f'prepare, {gib:g} GiB, all told':<34}{prepared['mb_per_second']:>8.1f}"
        f"{prepared['tokens_per_second']:>14,.0f}{prepared['cores_busy']:>12.2f}"
        f"{prepared['peak_mib_all_processes']:>10.0f} MiB"
    )
    print(f"{'SentencePiece alone, encoding':<34}{alone['mb_per_second']:>8.1f}{alone['tokens_per_second']:>14,.0f}")


def cpu_name() -> str:
    """What the operating system calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


if __name__ == "__main__":
    main()
