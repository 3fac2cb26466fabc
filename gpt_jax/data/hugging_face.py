"""Datasets as a source of records: those of the Hugging Face hub, and folders that the package `datasets` reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_jax.data.records import Record
from gpt_jax.errors import UserError

PREFIX = "hf:"
SPELLING = "hf:NAME,split=train,config=NAME,streaming"
BATCH_ROWS = 64  # One by one, rows take 20 times as long.


def is_dataset(name: str) -> bool:
    """Whether a source is a dataset, and no file: hf:// begins the path of a file on the hub."""
    return name.startswith(PREFIX) and not name.startswith(PREFIX + "//")


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, ready to be read."""

    name: str  # As the user spelled it.
    n_bytes: int  # Its size in memory; 0 when it is streamed, and then also the position of every record.
    rows: Any  # A datasets.Dataset or datasets.IterableDataset.

    def records(self, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """The rows in their order. columns: those that are read, as far as they are there, by their names or those of
        fields in them, such as a.b; None: all. Raises UserError when a row cannot be read."""
        rows, number = self.rows, 0
        if columns is not None:
            wanted = {part for name in columns for part in (name, name.partition(".")[0])}
            if found := [name for name in rows.column_names or () if name in wanted]:
                rows = rows.select_columns(found)
        with _errors_named(self.name):
            for batch in rows.iter(batch_size=BATCH_ROWS):
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    position = self.n_bytes * number // len(rows) if self.n_bytes else 0
                    yield Record(dict(zip(batch, values, strict=True)), f"{self.name}, row {number}", position)


def load_dataset(name: str) -> HubDataset:
    """The dataset that a source names, spelled as SPELLING, of which all but the name may be left out.

    NAME is a folder that `save_to_disk` made, another folder with files that `datasets` reads, or a name on the hub,
    whose files are downloaded first unless it is streamed; a stream is downloaded each time that it is read.
    Raises UserError for an option, a split or a configuration that is not there, naming those that are, for a name that
    is not found, without a network, and without the package `datasets`.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: this needs the package datasets: pip install 'gpt-jax[hf]'") from None
    path, *given = name.removeprefix(PREFIX).split(",")
    options: dict[str, str] = dict.fromkeys(("split", "config", "streaming"), "")
    for option in given:
        key, _, value = option.partition("=")
        if key not in options or (key == "streaming") == bool(value):
            raise UserError(f"{name}: {option!r} is no option; the spelling is {SPELLING}")
        options[key] = value or "yes"
    split, config = options["split"] or "train", options["config"]
    with _errors_named(name):
        is_dict = Path(path, "dataset_dict.json").exists()
        if not is_dict and not Path(path, "state.json").exists():
            streaming = bool(options["streaming"])
            rows = datasets.load_dataset(path, config or None, split=split, streaming=streaming)
            return HubDataset(name, 0 if streaming else rows.data.nbytes, rows)
        saved = datasets.load_from_disk(path)
        splits = saved if is_dict else {str(saved.split or "train"): saved}
        if config or split not in splits:
            what = f"configuration {config!r}" if config else f"split {split!r}; there are {', '.join(splits)}"
            raise UserError(f"{name}: {path} is a saved dataset without the {what}")
        return HubDataset(name, splits[split].data.nbytes, splits[split])


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Makes a UserError of one line of what the package `datasets` raises, which may be anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = " ".join(str(e.__cause__ or e).split()) or type(e).__name__
        advice = "; is the name right, and is there a network?" if isinstance(e, OSError) else ""
        raise UserError(f"{name} cannot be read ({why}){advice}") from e
