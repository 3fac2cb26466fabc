"""Data, before training and while it goes on: python -m benchmarks data [--conversations FILE ...] [--tokenizer PATH]

How fast `prepare` is and how much memory it takes, how fast batches are made beside what a training step consumes, what
a million tiny documents cost, and how full packed rows are. A published tokenizer that has ChatML's tokens gives one
row more. All of it is in a temporary folder, which is deleted.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.contest import OURS, Contest
from benchmarks.corpora import write_conversations, write_docstrings, write_documents, write_texts
from benchmarks.markdown import number
from benchmarks.measure import peak_memory, run_command, seconds_of, spread, watched_memory
from benchmarks.presets import Preset, presets
from benchmarks.results import Results, Row
from benchmarks.train import TARGET, WARM_UP, as_chosen
from benchmarks.worker import Worker
from gpt_jax.config import DataConfig
from gpt_jax.data.folders import together
from gpt_jax.data.loader import MixedBatches
from gpt_jax.data.packing import pack
from gpt_jax.data.shards import load_meta, open_dataset

CONTEXT = 1024
"""Of packing, where it is not varied."""

CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

RATES = (
    "tokens of both splits, and bytes of the source files, over the seconds of the whole command, which reads the "
    "source twice; a vocabulary is trained before, and that is not counted"
)
MEMORY = "memory is resident, libraries included; what processes share counts in each; the most of all rounds"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    text: int = 100_000_000  # Bytes of the source.
    conversations: int = 20_000_000
    memory: int = 2 << 30  # For the rows that are about memory, a run each.
    loader: int = 10_000_000  # Of each source of batches.
    documents: int = 1_000_000  # Tiny ones.
    vocab_size: int = 4096
    seconds: float = 1.0  # Of making batches, a turn.


Write = Callable[[Path], object]  # Writes a source into a file.


def run(
    results: Results,
    machine: Row,
    rounds: int,
    conversations: Sequence[Path] = (),
    tokenizer: Path | None = None,
    sizes: Sizes = Sizes(),
) -> None:
    """Measures the rows. conversations: files of them, to be packed.
    tokenizer: a published one."""
    trained = ("--tokenizer=sentencepiece", f"--vocab-size={sizes.vocab_size}")
    texts, chats = partial(write_texts, n_bytes=sizes.text), partial(write_conversations, n_bytes=sizes.conversations)
    rates: dict[str, tuple[Write | Sequence[Path], tuple[str, ...]]] = {
        "text, SentencePiece": (texts, trained),
        "text, bytes": (texts, ("--tokenizer=bytes",)),
        "conversations, SentencePiece": (chats, trained),
    }
    if tokenizer:
        rates[f"conversations, {tokenizer.stem}, ChatML"] = (chats, (f"--tokenizer={tokenizer}",))
    for name, (source, options) in rates.items():
        line = "prepare with 1 and with 2 processes that tokenise"
        results.measure(f"data/prepare/{name}", line, compare_processes, rounds, source, options)
    for name, write in (("text", write_texts), ("conversations", write_conversations)):
        gib, source = f"{number(sizes.memory / 2**30)} GiB", partial(write, n_bytes=sizes.memory)
        results.measure(f"data/memory/{name}, {gib}", "as a user starts it", prepare_once, source, trained)

    preset = presets(machine["platform"])["nano"]
    step = f"train/{preset.name}"
    if step not in results.rows:
        results.measure(step := f"data/step/{preset.name}", preset.describe(), train_alone, preset, machine, rounds)
    found = results.rows.get(step, {}).get("contestants", {}).get(OURS)
    consumed = found and found["tokens_per_second"]["median"]
    for context_length in (CONTEXT, 64):
        name, line = f"data/loader/{context_length}", f"batches of {preset.batch_size} rows of {context_length} tokens"
        results.measure(name, line, compare_loaders, preset, context_length, consumed, rounds, sizes)

    name, line = f"data/tiny/{sizes.documents:,} documents", "prepared, packed, opened and inspected"
    results.measure(name, line, compare_openings, rounds, sizes.documents)
    sources = {"docstrings": write_docstrings} | ({"conversations": conversations} if conversations else {})
    for name, source in sources.items():
        results.measure(f"data/fill/{name}", f"packed into rows of {CONTEXT + 1}", measure_fill, source, trained)


def take_turns(contestants: Mapping[str, Callable[[], Row]], rounds: int, *notes: str) -> Row:
    """The row of these contestants: the figures that each gives, as spreads where there are several rounds, and the
    most of those in bytes."""

    def show(turn: int, name: str, figures: Row) -> None:
        print(f"  round {turn + 1}: {name}: {', '.join(f'{k} {number(v)}' for k, v in figures.items())}", flush=True)

    def of_rounds(key: str, values: Sequence[float]) -> Row | float:
        return spread(values) if rounds > 1 and not key.endswith("bytes") else max(values)

    with Contest(needs=None) as contest:
        contest.contestants |= contestants
        turns = contest.turns(rounds, lambda measured: measured(), show)
    found = {
        who: {key: of_rounds(key, [figures[key] for figures in all_of]) for key in all_of[0]}
        for who, all_of in turns.items()
    }
    return {"rounds": rounds, "contestants": found, "failed": contest.failed, "notes": list(notes)}


def files_of(source: Write | Sequence[Path], folder: Path) -> Sequence[Path]:
    """The files of a source, which is written if it is not there."""
    if not callable(source):
        return source
    source(file := folder / "source.jsonl")
    return [file]


def preparation(files: Sequence[Path], out: Path, *options: str, processes: int = 0) -> Row:
    """The figures of preparing files once, with so many processes that tokenise; 0: one a core."""
    command = ("gpt_jax", "prepare", *map(str, files), f"--out={out}", "--force", f"--workers={processes}", *options)
    with watched_memory() as peak:
        seconds = run_command("-m", *command).seconds
    meta, n_bytes = load_meta(out), sum(file.stat().st_size for file in files)
    return {
        "seconds": seconds,
        "tokens_per_second": (meta.train.tokens + meta.val.tokens) / seconds,
        "mb_per_second": n_bytes / 1e6 / seconds,
        "peak_bytes": peak.all,
        "largest_bytes": peak.largest,
    }


def compare_processes(rounds: int, source: Write | Sequence[Path], options: Sequence[str]) -> Row:
    """The row of preparing a source, with the tokenizer made before."""
    with tempfile.TemporaryDirectory() as name:
        files, first, out = files_of(source, Path(name)), Path(name, "first"), Path(name, "out")
        template = Path(name, "template.jinja")
        template.write_text(CHATML, encoding="utf-8")
        published = not {*options} & {"--tokenizer=sentencepiece", "--tokenizer=bytes"}
        preparation(files, first, *options, *([f"--template={template}"] if published else []))
        contestants = {
            f"{n} process{'es' * (n > 1)}": partial(preparation, files, out, f"--tokenizer={first}", processes=n)
            for n in (1, 2)
        }
        return take_turns(contestants, rounds, RATES, MEMORY)


def prepare_once(source: Write | Sequence[Path], options: Sequence[str]) -> Row:
    """The row of preparing a source once."""
    with tempfile.TemporaryDirectory() as name:
        files = files_of(source, Path(name))
        return take_turns({OURS: partial(preparation, files, Path(name, "out"), *options)}, 1, MEMORY)


def train_alone(preset: Preset, machine: Row, rounds: int) -> Row:
    """The row of a preset's training step, for what it consumes."""
    with Contest() as contest:
        contest.add(OURS, TARGET, preset=preset, parallel=as_chosen(machine))
        contest.once("seconds", first=WARM_UP, count=2)
        seconds = contest.turns(rounds, lambda worker: worker.ask("seconds", first=1, count=preset.steps))[OURS]
    rates = spread([preset.tokens_per_step / each for each in seconds])
    found = {OURS: {"tokens_per_second": rates}}
    return {"rounds": len(seconds), "contestants": found, "failed": {}, "notes": [preset.describe()]}


def compare_loaders(preset: Preset, context_length: int, consumed: float | None, rounds: int, sizes: Sizes) -> Row:
    """The row of a context: the batches of each kind of source, made in this process one after the other."""
    writers: dict[str, Write] = {
        "short": partial(write_documents, n_documents=sizes.loader // 30, mean=30),
        "long": partial(write_documents, n_documents=sizes.loader // 500, mean=500),
        "chat": partial(write_conversations, n_bytes=sizes.loader, answer=1),
    }
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: str(Path(name, kind)) for kind in writers}
        for kind, write in writers.items():
            preparation(files_of(write, Path(name)), Path(folders[kind]), "--tokenizer=bytes")
        mixture = tuple(f"{folder}={weight}" for folder, weight in zip(folders.values(), (0.5, 0.3, 0.2), strict=True))
        kinds = {
            "stream": {"dir": folders["long"]},
            "packed documents of 30 tokens": {"dir": folders["short"], "packing": "documents"},
            "packed documents of 500 tokens": {"dir": folders["long"], "packing": "documents"},
            "packed conversations": {"dir": folders["chat"]},
            "mixture of two streams and conversations": {"mixture": mixture},
        }
        contestants = {}
        for kind, fields in kinds.items():
            config = DataConfig(batch_size=preset.batch_size, **fields)  # type: ignore[arg-type]
            opened = together([open_dataset(Path(folder)) for folder in config.folders], config)
            batches = opened.batches(context_length, seed=0)
            contestants[kind] = partial(making, batches, preset.batch_size * context_length, consumed, sizes.seconds)
        notes = [f"batches of {preset.batch_size} rows, without the thread that makes them beforehand"]
        if consumed:
            notes.append(f"times what training consumes: a step of {preset.name} takes {number(consumed)} tokens/s")
        return take_turns(contestants, rounds, *notes)


def making(batches: MixedBatches, n_tokens: int, consumed: float | None, limit: float) -> Row:
    """The figures of making batches of so many tokens for so many seconds, from the first step on."""
    step, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < limit:
        batches(step)
        step += 1
    rate = step * n_tokens / seconds
    return {"tokens_per_second": rate, **({"times_consumed": rate / consumed} if consumed else {})}


class Opening:
    """Opens a data folder, in a process of its own."""

    def first_batch(self, folder: str) -> Row:
        """The figures of a first batch of packed documents, whose packing is made if it is not there."""
        config = DataConfig(dir=folder, packing="documents")
        seconds = seconds_of(lambda: together([open_dataset(Path(folder))], config).batches(CONTEXT, seed=0)(0))
        return {"seconds": seconds, "peak_bytes": peak_memory()}


def compare_openings(rounds: int, n_documents: int) -> Row:
    """The row of many tiny documents: to prepare, pack, open and inspect them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        files = files_of(partial(write_documents, n_documents=n_documents, mean=20), Path(name))

        def prepared() -> Row:
            return preparation(files, folder, "--tokenizer=bytes")

        def first_batch(again: bool) -> Row:
            for file in () if again else folder.glob("*-packing-*"):
                file.unlink()
            with Worker("benchmarks.data:Opening") as worker:
                figures: Row = worker.ask("first_batch", folder=str(folder))
            return figures

        def inspected() -> Row:
            with watched_memory() as peak:
                seconds = run_command("-m", "gpt_jax", "inspect", str(folder)).seconds
            return {"seconds": seconds, "peak_bytes": peak.all}

        contestants: dict[str, Callable[[], Row]] = {
            "`prepare`": prepared,
            "open, pack, first batch": partial(first_batch, again=False),
            "open, first batch": partial(first_batch, again=True),
            "`inspect`": inspected,
        }
        what = f"20 tokens a document on average, which are bytes; rows of {CONTEXT + 1}"
        return take_turns(contestants, rounds, what, "seconds of a command are all of it, the others without imports")


def measure_fill(source: Write | Sequence[Path], options: Sequence[str]) -> Row:
    """The row of how full the rows of a source's training split are."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "out")
        preparation(files_of(source, Path(name)), out, *options)
        packing = pack(open_dataset(out).train, CONTEXT)
    figures = {key: getattr(packing.counts, key) for key in ("documents", "rows", "fill", "cut", "dropped")}
    figures["next_fit"] = packing.next_fit_fill()
    print(f"  full {figures['fill']:.2%}, next-fit {figures['next_fit']:.2%}", flush=True)
    notes = [
        f"full: tokens in the rows over {CONTEXT + 1} times the number of rows; of the training split",
        "next-fit: the same pieces in their order, each row until one does not fit",
    ]
    return {"rounds": 1, "contestants": {"best-fit decreasing": figures}, "failed": {}, "notes": notes}
