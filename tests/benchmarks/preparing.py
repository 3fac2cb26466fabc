"""How fast `gpt_jax prepare` is, and how much memory it takes: python -m tests.benchmarks.preparing [GIB]

Of so much text (default: 1 GiB), with the default tokenizer, run as a user starts it; and SentencePiece alone. Writes
benchmarks/results/prepare.json; `test_memory` holds the memory within bounds.
"""

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.corpora import write_texts
from benchmarks.machine import cpu_name
from benchmarks.measure import seconds_of, watched_memory
from benchmarks.results import FOLDER, Row
from gpt_jax.storage.files import save_json
from gpt_jax.system import available_cores


def main(gib: float) -> None:
    """Measures, and writes the results."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        write_texts(corpus, int(gib * 2**30))
        prepared = prepare(corpus, out)
        alone = run_sentencepiece(corpus, out / "tokenizer.model")
    row: Row = {
        "machine": {"cpu": cpu_name(), "cores": available_cores(), "python": platform.python_version()},
        "prepare": prepared,
        "sentencepiece_alone_on_one_core": alone,
        "times_as_fast": prepared["tokens_per_second"] / alone["tokens_per_second"],
    }
    row["table"] = table(row)
    for line in row["table"]:
        print(": ".join(filter(None, line)))
    save_json(FOLDER / "prepare.json", row)


def table(row: Row) -> list[tuple[str, str]]:
    """The cells of the table in docs/speed.md."""
    found, alone = row["prepare"], row["sentencepiece_alone_on_one_core"]
    rate = f"{found['mb_per_second']:.1f} MB/s, {found['tokens_per_second'] / 1e6:.1f} million tokens/s"
    title = f"`prepare` of {found['text_bytes'] / 2**30:.1f} GiB of text (`python -m tests.benchmarks.preparing`)"
    return [
        (title, ""),
        ("time", f"{found['seconds']:.0f} s: {rate}"),
        ("cores busy, reading twice included", f"{found['cores_busy']:.2f} of {row['machine']['cores']}"),
        ("memory at most, all processes", f"{found['peak_mib_all_processes']:.0f} MiB"),
        ("SentencePiece alone on one core", f"{alone['tokens_per_second'] / 1e6:.1f} million tokens/s"),
    ]


def prepare(corpus: Path, out: Path) -> dict[str, float]:
    """Runs `prepare` as a process, and watches the memory of it and of its workers."""
    from gpt_jax.data.shards import load_meta

    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with watched_memory() as peak:
        subprocess.run([sys.executable, "-m", "gpt_jax", "prepare", str(corpus), "--out", str(out)], check=True)
    seconds = time.perf_counter() - begin
    after, meta = resource.getrusage(resource.RUSAGE_CHILDREN), load_meta(out)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        **rates(seconds, meta.train.bytes + meta.val.bytes, meta.train.tokens + meta.val.tokens),
        "cores_busy": cpu_seconds / seconds,
        "peak_mib_all_processes": peak.all / 2**20,
        "peak_mib_largest_process": peak.largest / 2**20,
    }


def run_sentencepiece(corpus: Path, model: Path, most_bytes: int = 64 << 20) -> dict[str, float]:
    """SentencePiece itself on one core, document after document, of the first 64 MiB; only encoding is timed."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    documents: list[str] = []
    n_bytes = 0
    with corpus.open(encoding="utf-8") as f:
        while n_bytes < most_bytes and (line := f.readline()):
            documents.append(json.loads(line)["text"])
            n_bytes += len(documents[-1].encode())
    counts: list[int] = []
    seconds = seconds_of(lambda: counts.extend(len(processor.encode(document)) for document in documents))
    return rates(seconds, n_bytes, sum(counts))


def rates(seconds: float, text_bytes: int, tokens: int) -> dict[str, float]:
    """What was tokenised in that time, and how fast."""
    per_second = {"mb_per_second": text_bytes / 1e6 / seconds, "tokens_per_second": tokens / seconds}
    return {"seconds": seconds, "text_bytes": text_bytes, "tokens": tokens, **per_second}


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
