"""`gpt-jax inspect`: what a data folder holds, and what training sees of it at a step."""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from gpt_jax.cli.parse import parse
from gpt_jax.cli.report import Bar, Bars, Block, Passage, Report, Table, to_page, to_text
from gpt_jax.config import Config, DataConfig, check, load_saved_config
from gpt_jax.config.training import PackingName
from gpt_jax.data.folders import DataFolders, together
from gpt_jax.data.inspect import (
    count_tokens,
    document_lengths,
    facts,
    histogram,
    most_frequent,
    percentiles,
    token_text,
)
from gpt_jax.data.marked import runs
from gpt_jax.data.packing import pack
from gpt_jax.data.rows import Stream, Tokens
from gpt_jax.data.shards import FORMATS, META_FILE, Dataset, SplitName, missing, open_dataset
from gpt_jax.data.windows import Window, windows
from gpt_jax.errors import UserError
from gpt_jax.storage.files import replacing
from gpt_jax.storage.remote import location
from gpt_jax.system import shows_color
from gpt_jax.tokenizer.tokenizer import Tokenizer

MOST_TOKENS = 20
"""Tokens in a list of the most frequent ones."""


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """Tell what a data folder holds: documents, tokens, lengths, how documents fill windows. With --step, show the
    windows that training sees at that step. Of a run, its own folders and settings are taken."""

    data: tyro.conf.Positional[str] = ""  # Folder made by prepare, here or at an address, or the folder of a run.
    step: int | None = None  # Show the windows of this step. The first step is 1, as in metrics.jsonl.
    rows: int = 4  # With --step: windows to show, of those in the batch.
    split: SplitName = "train"  # Split to count: train or val. Steps are of train.
    context_length: int | None = None  # Tokens that a window predicts; None: as in the run, or 1024.
    batch_size: int | None = None  # Windows of a step; None: as in the run, or 32.
    seed: int | None = None  # train.seed, which decides the order of the windows; None: as in the run, or 0.
    # How documents fill the windows: auto, stream or documents, see data.packing; None: as in the run, or auto.
    packing: PackingName | None = None
    mixture: tuple[str, ...] = ()  # In place of a folder: several with their weights, as data/web=0.7 data/chat=0.3.
    curriculum: tuple[str, ...] = ()  # With --mixture: other weights from a step on, as 5000:0.5,0.5.
    html: str = ""  # File to write all that to, as a page for a browser, instead of printing it.

    def __post_init__(self) -> None:
        if self.step is not None:
            check(1 <= self.step < 2**31, "step", self.step, "1, which is the first one, or more, and less than 2**31")
        check(self.rows >= 1, "rows", self.rows, "1 or more")
        if bool(self.data) == bool(self.mixture):
            raise UserError("name what to inspect: a data folder or a run, or else several folders by --mixture")
        if self.curriculum and not self.mixture:
            raise UserError("--curriculum goes with --mixture only")
        if self.step is not None and self.split != "train":
            raise UserError("steps are of the training split; leave out --split, or --step")


def command(argv: Sequence[str]) -> int:
    """Prints what a data folder or the data of a run hold, or writes it as a page."""
    args = parse(InspectArgs, argv, "inspect")
    config, of_run = settings(args)
    datasets = [open_dataset(location(folder)) for folder in config.data.folders]
    if args.step is None and len(datasets) == 1:  # Preferences and problems, too, of which there are no windows.
        folders = DataFolders({Path(config.data.dir).name: datasets[0]}, config.data)
    else:
        folders = together(datasets, config.data)
    if of_run:
        check_trained_on(args.data, config, folders)
    name = args.data or "a mixture"
    if args.step is None:
        report = statistics(folders, config, args.split, of_run)
    else:
        report = step_report(name, folders, config, args.step, args.rows, of_run)
    if not args.html:
        print(to_text(report, shows_color()))
        return 0
    try:
        with replacing(Path(args.html)) as temporary:
            temporary.write_text(to_page(name, report), encoding="utf-8")
    except OSError as e:
        raise UserError(f"{args.html} could not be written ({e.strerror})") from e
    print(f"written to {args.html}")
    return 0


def settings(args: InspectArgs) -> tuple[Config, bool]:
    """The configuration of the run, or the defaults, with the values that `args` give; and whether it is a run's.

    Raises UserError for a folder that is neither of a run nor of data, and for impossible values.
    """
    config, of_run = Config(data=DataConfig(dir=args.data, mixture=args.mixture, curriculum=args.curriculum)), False
    if args.data:
        folder = location(args.data)
        if not (folder / META_FILE).exists():
            if not folder.exists():
                raise missing(folder, "; name one that prepare made, or the folder of a run")
            if not (folder / "config.json").exists():
                raise UserError(f"{folder} is neither a data folder, with a {META_FILE}, nor a run, with a config.json")
            config, of_run = load_saved_config(folder / "config.json"), True

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    model = dataclasses.replace(config.model, **given(context_length=args.context_length))
    data = dataclasses.replace(config.data, **given(batch_size=args.batch_size, packing=args.packing))
    train = dataclasses.replace(config.train, **given(seed=args.seed))
    return dataclasses.replace(config, model=model, data=data, train=train), of_run


def check_trained_on(run: str, config: Config, folders: DataFolders) -> None:
    """Raises UserError when the latest checkpoint of a run was trained on other data than are in the folders now."""
    from gpt_jax.run.folder import run_folder  # Here, since it imports JAX, which data folders do not need.
    from gpt_jax.run.load import RunSource

    folder = run_folder(run)
    if folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir()):
        try:
            RunSource(folder, config, "latest").check_data(*folders.metas)
        except UserError as e:
            raise UserError(f"{e}; or name the data folder itself, to see what is in it now") from e


def statistics(folders: DataFolders, config: Config, split: SplitName, of_run: bool) -> Report:
    """What each folder holds, and how it fills windows."""
    report: list[Block] = []
    if of_run or len(folders.by_name) > 1:
        report.append(mixture_table(folders, config))
    for folder, data in zip(config.data.folders, folders.by_name.values(), strict=True):
        report += folder_report(folder, data, split, config.model.context_length, folders.packs(data))
    return report


def mixture_table(folders: DataFolders, config: Config) -> Table:
    """The settings by which batches are drawn, and how often each folder is read."""
    steps, T = config.train.steps, config.model.context_length
    epochs = folders.batches(T, config.train.seed).epochs(steps)
    stages = config.data.stages()
    rows = {
        "a step": f"{config.data.batch_size:,} windows of {T:,} tokens",
        "packing": config.data.packing,
        "seed": f"{config.train.seed}",
    }
    for i, name in enumerate(folders.by_name):
        weights = [f"{w[i]:g}" + f" after step {start:,}" * (start > 0) for start, w in stages]
        rows[f"weight of {name}"] = f"{', '.join(weights)}; {epochs[name]:,.3g} epochs in {steps:,} steps"
    return Table("batches", rows)


def folder_report(folder: str, data: Dataset, split: SplitName, T: int, packs: bool) -> Report:
    """What a folder holds: counts, lengths of documents, frequent tokens, and how documents fill windows."""
    tokens, of = data.split(split), {"train": "training", "val": "validation"}[split]
    lengths, counts = document_lengths(tokens), count_tokens(tokens, data.meta.vocab_size)
    names = {0: "shortest", 50: "median", 100: "longest"}
    spread = [f"{names.get(percent, f'{percent}%')} {n:,}" for percent, n in percentiles(lengths).items()]
    spread.append(f"mean {len(tokens) / len(lengths):,.1f}")
    bars = [
        Bar((f"{b.shortest:,} to {b.longest:,}" if b.longest > 1 else "1", f"{b.documents:,}"), b.documents)
        for b in histogram(lengths)
    ]
    return [
        Table(folder, facts(data) | {f"lengths ({of})": ", ".join(spread)}),
        Bars(f"{of} documents by their length in tokens", bars),
        frequent(f"most frequent tokens ({of})", data.tokenizer, counts.all),
        *([] if counts.learnt is None else [frequent("of those to be learnt", data.tokenizer, counts.learnt)]),
        *(
            [Table(f"{of} documents in windows of {T:,} tokens and one more", fill(tokens, T, packs))]
            if data.meta.format in FORMATS["next_token"]
            else []
        ),
    ]


def frequent(title: str, tokenizer: Tokenizer, counts: np.ndarray) -> Bars:
    """The most frequent tokens, each with its id and its share."""
    total = max(int(counts.sum()), 1)
    found = most_frequent(counts, MOST_TOKENS)
    rows = [Bar((token_text(tokenizer, i), f"{i}", f"{n:,}", f"{n / total:.2%}"), n) for i, n in found]
    return Bars(title, rows)


def fill(tokens: Tokens, T: int, packs: bool) -> dict[str, str]:
    """How the documents of a split fill windows of T + 1 tokens, packed and as a stream. packs: what training does."""
    packing, stream = pack(tokens, T), len(Stream(tokens, T))
    counts, n_documents = packing.counts, f"of {packing.counts.documents:,} documents"
    if tokens.masked:
        how_cut, why_dropped = "cut after a turn", "whose first answer to learn does not fit"
    else:
        how_cut, why_dropped = "cut into several windows", "of one token"
    return {
        "training takes": "documents" if packs else "stream",
        "stream": f"{stream:,} windows an epoch, all full" if stream else f"no whole window: {len(tokens):,} tokens",
        "documents": f"{counts.rows:,} windows an epoch, {counts.fill:.2%} full; in the order of the documents, by "
        f"next-fit, {packing.next_fit_fill():.2%}",
        "  longer than one": f"{counts.cut:,} {n_documents}, {how_cut}",
        "  dropped": f"{counts.dropped:,} {n_documents}, {why_dropped}; {counts.lost:,} tokens are in no window",
    }


def step_report(name: str, folders: DataFolders, config: Config, step: int, most: int, of_run: bool) -> Report:
    """The windows of a step, `most` of them."""
    T, seed = config.model.context_length, config.train.seed
    found = windows(folders.batches(T, seed), step)
    n_targets = sum(int(window.learnt.sum()) for window in found)
    rows = {"windows": f"{len(found):,} of {T:,} tokens and one more, by seed {seed}; {n_targets:,} targets"}
    if any(window.masked for window in found[:most]):
        rows["marked"] = "what is learnt; nothing, where all of it is"
    if of_run and step > config.train.steps:
        rows["note"] = f"the run ends at step {config.train.steps:,}; a longer one would see this"
    if len(found) > most:
        rows["left out"] = f"{len(found) - most:,} windows; --rows {len(found)} shows all"
    passages = [passage(window, i, len(found), folders.tokenizer) for i, window in enumerate(found[:most], 1)]
    return [Table(f"step {step:,} of {name}", rows), *passages]


def passage(window: Window, number: int, n: int, tokenizer: Tokenizer) -> Passage:
    """A window as text, document by document."""
    parts, learnt, tokens = [], window.learnt, window.row.tokens
    ends = [*accumulate(piece.length for piece in window.pieces)]
    for piece, end in zip(window.pieces, ends, strict=True):
        here, heading = slice(end - piece.length, end), f"document {piece.document:,}"
        if piece.length < piece.whole:
            heading += f", tokens {piece.first:,} to {piece.first + piece.length - 1:,} of {piece.whole:,}"
        parts.append((heading, runs(tokenizer, tokens[here], learnt[here] if window.masked else None)))
    if padding := len(tokens) - ends[-1]:
        parts.append((f"{padding:,} token{'s' * (padding > 1)} of padding", []))
    title = f"window {number:,} of {n:,}, from {window.folder}: {learnt.sum():,} targets"
    return Passage(title, parts)
