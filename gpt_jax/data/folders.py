"""The data folders of a run, and the batches that they give for training and for validation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt_jax.config import DataConfig
from gpt_jax.data.batch import Batch
from gpt_jax.data.loader import MixedBatches, Source, eval_batches, packed_eval_batches
from gpt_jax.data.mixture import Stage
from gpt_jax.data.packing import PackedRows, open_packing, pack
from gpt_jax.data.rows import Rows, Stream
from gpt_jax.data.shards import Dataset, Meta, SplitName
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath
from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataFolders:
    """The data folders that a run is trained on, open for reading, which have one tokenizer."""

    by_name: dict[str, Dataset]  # The last part of the path or, where several end alike, all of it.
    config: DataConfig
    _packed: dict[tuple[AnyPath, SplitName, int], PackedRows] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """Theirs, with the chat template of the one that has conversations."""
        tokenizers = [data.tokenizer for data in self.by_name.values()]
        return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template is not None), tokenizers[0])

    @property
    def metas(self) -> list[Meta]:
        """The content of each folder's meta.json."""
        return [data.meta for data in self.by_name.values()]

    def rows(self, data: Dataset, split: SplitName, context_length: int) -> Rows:
        """The windows of a split of one of the folders. A packing is made once, and kept in a local folder."""
        tokens, key = data.split(split), (data.folder, split, context_length)
        if not self.packs(data):
            return Stream(tokens, context_length)
        if key not in self._packed:  # Every evaluation asks for it.
            if isinstance(data.folder, Path):
                fingerprint = data.meta.splits[split].fingerprint
                packing = open_packing(data.folder, split, tokens, fingerprint, context_length)
            else:
                packing = pack(tokens, context_length)
            self._packed[key] = PackedRows(tokens, packing)
        return self._packed[key]

    def packs(self, data: Dataset) -> bool:
        """True if the documents of a folder stay whole, and apart from each other."""
        return self.config.packing == "documents" or (self.config.packing == "auto" and data.train.masked)

    def describe(self, context_length: int) -> list[str]:
        """A line for each folder: its tokens, and how its documents fill the windows."""
        lines, [(_, weights), *_] = [], self.config.stages()
        for data, folder, weight in zip(self.by_name.values(), self.config.folders, weights, strict=True):
            line = f"{folder}: {len(data.train):,} training and {len(data.val):,} validation tokens"
            if data.train.n_learnt is not None:
                line += f", {data.train.n_learnt / len(data.train):.0%} to be learnt"
            if isinstance(rows := self.rows(data, "train", context_length), PackedRows):
                counts = rows.packing.counts
                line += f", packed into {counts.rows:,} windows, {counts.fill:.1%} full"
                line += f", {counts.cut:,} documents cut" * bool(counts.cut)
                line += f", {counts.dropped:,} dropped ({counts.lost:,} tokens)" * bool(counts.dropped or counts.lost)
            lines.append(line if len(self.by_name) == 1 else f"{line}; weight {weight:g}")
        return lines

    def batches(self, context_length: int, seed: int) -> MixedBatches:
        """The batches of training, a function of the step. Raises UserError for a folder without a whole window, and
        for an impossible mixture."""
        sources = [Source(name, self.rows(data, "train", context_length)) for name, data in self.by_name.items()]
        stages = [Stage(*stage) for stage in self.config.stages()]
        used = [any(weights) for weights in zip(*(stage.weights for stage in stages), strict=False)]
        for (name, rows), is_used in zip(sources, used, strict=False):  # MixedBatches tells of other lengths.
            if is_used and not len(rows):
                tokens = len(self.by_name[name].train)
                raise UserError(
                    f"the training split of {name} has {tokens} tokens, and no window of model.context_length + 1 = "
                    f"{context_length + 1}; use more text or another context length"
                )
        return MixedBatches(sources, stages, self.config.batch_size, seed)

    def has_validation(self, data: Dataset, context_length: int) -> bool:
        """True if the validation split of a folder has a token to be predicted."""
        if self.packs(data):
            return len(self.rows(data, "val", context_length)) > 0
        return len(data.val) >= 2 and data.val.n_learnt != 0

    def validation(self, name: str, context_length: int, batch_size: int) -> Iterator[Batch]:
        """The validation split of a folder in order, every token that is to be learnt a target once."""
        data = self.by_name[name]
        if self.packs(data):
            return packed_eval_batches(self.rows(data, "val", context_length), batch_size)
        return eval_batches(data.val, context_length, batch_size)


def names_of(folders: tuple[str, ...]) -> list[str]:
    """A name for each folder: the last part of its path, or all of it if another one ends alike."""
    ends = [Path(folder).name for folder in folders]
    return [end if ends.count(end) == 1 else folder for end, folder in zip(ends, folders, strict=True)]


def together(datasets: list[Dataset], config: DataConfig) -> DataFolders:
    """The open folders of a run. Raises UserError when one is not for its objective, and when their tokenizers or their
    chat templates differ."""
    for folder in datasets:
        folder.check_format("next_token")
    by_name = dict(zip(names_of(config.folders), datasets, strict=True))
    (first, data), *others = by_name.items()
    templates = {
        name: d.tokenizer.chat_template for name, d in by_name.items() if d.tokenizer.chat_template is not None
    }
    for name, other in others:
        if other.tokenizer.fingerprint != data.tokenizer.fingerprint:
            raise UserError(
                f"{first} and {name} were prepared with different tokenizers; prepare one with --tokenizer of the other"
            )
    if len(set(templates.values())) > 1:
        raise UserError(
            f"{' and '.join(templates)} were prepared with different chat templates; prepare them with one --template"
        )
    return DataFolders(by_name, config)
