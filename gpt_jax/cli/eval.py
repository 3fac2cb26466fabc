"""`gpt-jax eval`: loads a model, evaluates it on a text, and prints the numbers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpt_jax.cli.parse import ModelArgs, Switch, parse
from gpt_jax.cli.terminal import print_json, print_table
from gpt_jax.config import ParallelConfig, QuantizeName, check
from gpt_jax.data.shards import Dataset, SplitName, open_dataset
from gpt_jax.data.sources import Corpus, open_corpus
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import location
from gpt_jax.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt_jax.evaluate.loss import Tally
    from gpt_jax.run.load import Source

MOST_CONTEXT = 2048
"""Default limit on the tokens of a published model's window: some models have a context of a hundred thousand, which
would take hours without an accelerator."""


@dataclass(frozen=True)
class EvalArgs(ModelArgs):
    """Tell how well a GPT predicts a text: loss, perplexity, bits per byte. Every token is scored exactly once. The
    windows of a published model have at most 2048 tokens, unless --context-length asks for more."""

    data: str = ""  # Folder made by prepare; empty: the one that the run was trained on.
    split: SplitName = "val"  # Split of that folder: val or train, read as one stream of tokens.
    text: tuple[str, ...] = ()  # Instead of --data: files, folders, globs or corpora, each document scored on its own.
    # Field or column of JSON and Parquet with the text, nested as in meta.text; empty: files are read as they are.
    text_field: str = "text"
    # Tokens from the start of one window to the start of the next; None: context_length. With a smaller stride, each
    # token after the first window is predicted from at least context_length - stride tokens, which takes longer.
    stride: int | None = None
    batch_size: int = 8  # Windows that a device scores at the same time; on a mesh, of each part of the batch.
    quantize: QuantizeName = "none"  # int8: round the matrices to 8 bits, with a scale a row; docs/sample.md.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    json: Switch = False  # Print one JSON object.

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        if self.text and self.data:
            raise UserError("--text names a text, and --data another one; use one of them")
        if self.model and not (self.text or self.data):
            raise UserError("--model needs a text: name it with --text, or a data folder with --data")


def command(argv: Sequence[str]) -> int:
    """Loads a model and prints how well it predicts a text."""
    evaluate(parse(EvalArgs, argv, "eval"))
    return 0


def evaluate(args: EvalArgs) -> None:
    """Evaluates as `args` say, and prints the numbers. Raises UserError for errors that the user can fix."""
    from gpt_jax import runtime
    from gpt_jax.evaluate.loss import evaluate_blocks, evaluate_split
    from gpt_jax.evaluate.score import Scorer
    from gpt_jax.model.backend import fallback
    from gpt_jax.placement import choose_placement
    from gpt_jax.run.load import RunSource, config_to_load, load_model

    source = args.source()
    text_name, text = open_text(args, source)  # Raises before the model is loaded.
    own_context = source.config.context_length
    T = args.context_length or (min(own_context, MOST_CONTEXT) if args.model else own_context)
    if not args.context_length and own_context > T:
        print(f"windows of {T:,} tokens, of the model's {own_context:,}; --context-length takes more", file=sys.stderr)
    stride = T if args.stride is None else args.stride
    check(1 <= stride <= T, "stride", stride, f"between 1 and context_length = {T}")
    runtime.setup(args.parallel.n_asked or 1)
    devices = runtime.choose_devices(args.parallel)
    placement = choose_placement(args.parallel, config_to_load(source, T), devices)
    model, params, tokenizer = load_model(source, T, placement, args.quantize)
    if slower := fallback(model.config, runtime.hardware(devices[0]), placement.context):
        print(f"attention {model.config.attention}, {slower}", file=sys.stderr)

    scorer = Scorer(model, params, placement, args.batch_size)
    if isinstance(text, Corpus):
        tally = evaluate_blocks(scorer, text.blocks(lambda n_bytes: None), tokenizer, T, stride)
    else:
        check_tokenizer(text_name, text, tokenizer)
        if isinstance(source, RunSource) and not args.data:
            try:  # Prepared again with another division, the validation text would be what was trained on.
                source.check_data(text.meta)
            except UserError as e:
                raise UserError(f"{e}; --data {text_name.rpartition(', ')[0]} evaluates on them as they are") from e
        tally = evaluate_split(scorer, text.train if args.split == "train" else text.val, T, stride)

    model_name = args.model or f"{source.where}, checkpoint {args.checkpoint}"
    if args.json:
        settings = {"model": model_name, "text": text_name, "context_length": T, "stride": stride}
        print_json({**settings, **report(tally)})
    else:
        print_table(table(model_name, text_name, f"{T} tokens, {stride} from one to the next", report(tally)), 18)


def open_text(args: EvalArgs, source: "Source") -> tuple[str, Corpus | Dataset]:
    """The name of the text or data folder to evaluate on, and its contents. Raises UserError when it is missing."""
    if args.text:
        return ", ".join(args.text), open_corpus(args.text, args.text_field)
    from gpt_jax.run.load import RunSource

    folder = args.data
    if isinstance(source, RunSource) and not folder:
        folder, *others = source.saved.data.folders
        if others:
            names = ", ".join([folder, *others])
            raise UserError(f"{source.folder} was trained on several folders; name one by --data: {names}")
    data = open_dataset(location(folder))
    data.check_format("next_token")
    return f"{folder}, {args.split}", data


def check_tokenizer(text_name: str, data: Dataset, tokenizer: Tokenizer) -> None:
    """Raises UserError when a data folder was prepared with another tokenizer than the model's."""
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{text_name}: these tokens were made by another tokenizer than the model's; "
            "name the text itself with --text, or prepare it with the --tokenizer of the model's folder"
        )


def report(tally: "Tally") -> dict[str, float]:
    """The numbers of an evaluation by name; those of characters only when they were counted."""
    numbers = {"loss": tally.loss, "perplexity": tally.perplexity, "bits_per_byte": tally.bits / tally.bytes}
    counts = {"tokens": tally.tokens, "documents": tally.documents, "bytes": tally.bytes}
    if tally.characters is None:
        return numbers | counts
    per_character = {"bits_per_character": tally.bits / tally.characters}
    return numbers | per_character | counts | {"characters": tally.characters}


def table(model: str, text: str, windows: str, numbers: dict[str, float]) -> dict[str, str]:
    """The report as a table of names and texts."""
    counts = ", ".join(f"{numbers[name]:,} {name}" for name in ("documents", "bytes", "tokens"))
    rows = {
        "model": model,
        "text": f"{text}: {counts}",
        "windows": windows,
        "loss": f"{numbers['loss']:.4f} nats a token",
        "perplexity": f"{numbers['perplexity']:.4g}",
    }
    for unit in ("byte", "character"):
        if f"bits_per_{unit}" in numbers:
            rows[f"bits a {unit}"] = f"{numbers[f'bits_per_{unit}']:.4f}"
    return rows
