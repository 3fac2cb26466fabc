"""Token ids on disk: shards of plain integers, and a `meta.json` that describes them.

A data folder holds, for each of the splits `train` and `val`, shards `train-00000-of-00002.bin`... (token ids, uint16
if the vocabulary allows it, else uint32, little endian, no header) and `train-documents.bin` (the first token of each
document in the split, uint64, little endian), and besides `meta.json` and the tokenizer's file. Every text is followed
by one <|endoftext|>. Conversations are as their template writes them, and each shard has a mask beside it,
`train-00000-of-00002.learnt.bin`: a byte a token, 1 where the token is to be learnt. Preferences and problems have more
files beside these; see the modules `preferences` and `problems`.
"""

import bisect
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.storage.files import save_json
from gpt_jax.storage.folders import local_copy
from gpt_jax.storage.ranged import RemoteArray
from gpt_jax.storage.remote import AnyPath, RemotePath
from gpt_jax.system import command_line
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer

# Versions before masks must not take the one for the other, nor those before sets a set for text to learn.
FORMAT_VERSIONS = {"plain": 1, "masked": 2, "set": 3}
FORMATS: dict[str, tuple[str, ...]] = {
    "next_token": ("text", "chat", "completion"),
    "dpo": ("preference",),
    "grpo": ("problem",),
}
"""The formats (see messages.Format) of the data that each objective learns from."""
SHARD_TOKENS = 100_000_000
META_FILE = "meta.json"

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Split:
    """The entry of `meta.json` for the training or the validation text."""

    tokens: int  # Including those that end documents.
    documents: int  # Texts, or examples made of conversations.
    bytes: int  # Of the text, in UTF-8; with a mask, of the text that is to be learnt.
    shards: tuple[Shard, ...]
    documents_file: str
    # SHA-256 of the shards, one after the other, then of the masks, then of what else there is beside them; empty in
    # folders that older versions made.
    fingerprint: str = ""
    learnt: int | None = None  # Tokens that are to be learnt, by the masks; None: there are no masks, and all are.


@dataclass(frozen=True)
class Meta:
    """The content of `meta.json`."""

    format_version: int
    dtype: str  # Of the token ids: uint16 or uint32.
    vocab_size: int
    tokenizer_file: str
    tokenizer_fingerprint: str  # SHA-256 of that file.
    source_fingerprint: str  # See texts.fingerprint.
    train: Split
    val: Split
    settings: dict[str, Any]  # The arguments of `prepare`.
    format: str = "text"  # One of messages.Format.
    report: dict[str, Any] = field(default_factory=dict)  # Counts of what was kept, and of what was left out and why.

    @property
    def splits(self) -> dict[SplitName, Split]:
        """Both splits by their names."""
        return {"train": self.train, "val": self.val}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which token ids are stored: uint16 for up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class SplitWriter:
    """Writes the shards and the document starts of one split into an existing folder."""

    def __init__(self, folder: Path, name: SplitName, vocab_size: int, masked: bool = False) -> None:
        self._folder = folder
        self._name = name
        self._documents_file = f"{name}-documents.bin"
        self._starts = (folder / self._documents_file).open("wb")
        self._files = [_ShardFiles(folder, name, ".bin", token_dtype(vocab_size))]
        self._files += [_ShardFiles(folder, name, ".learnt.bin", np.dtype(np.uint8))] if masked else []
        self._tokens = self._documents = self._document_start = self._learnt = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._starts.close()
        for files in self._files:
            files.close()

    def write(self, tokens: np.ndarray, ends: np.ndarray, learnt: np.ndarray | None = None) -> None:
        """Appends token ids, int (N,); the places after the last tokens of documents that end among them, ascending;
        and, with a mask, whether each token is to be learnt, bool (N,)."""
        if len(ends):
            ends = ends + self._tokens
            self._starts.write(np.concatenate(([self._document_start], ends[:-1])).astype("<u8").tobytes())
            self._document_start = int(ends[-1])
            self._documents += len(ends)
        self._tokens += len(tokens)
        for files, values in zip(self._files, (tokens,) if learnt is None else (tokens, learnt), strict=True):
            files.write(values)
        self._learnt += 0 if learnt is None else int(learnt.sum())

    def finish(self, n_bytes: int, beside: Sequence[Path] = ()) -> Split:
        """Closes the files, and gives the shards their final names. n_bytes: see Split.bytes. beside: other files of
        the split, which are complete."""
        self.__exit__()
        shards, *_ = [files.finish() for files in self._files]
        sha256, *others = [files.sha256 for files in self._files]
        for other in others:
            sha256.update(other.digest())
        for path in beside:
            with path.open("rb") as f:
                sha256.update(hashlib.file_digest(f, "sha256").digest())
        learnt = self._learnt if others else None
        return Split(self._tokens, self._documents, n_bytes, shards, self._documents_file, sha256.hexdigest(), learnt)


class _ShardFiles:
    """Files of SHARD_TOKENS values each, one after the other."""

    def __init__(self, folder: Path, name: SplitName, suffix: str, dtype: np.dtype) -> None:
        self._folder, self._name, self._suffix, self._dtype = folder, name, suffix, dtype
        self._file: BinaryIO | None = None  # The last one, open; all others are full and closed.
        self._filled: list[int] = []  # Values in each file.
        self.sha256 = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        while len(values):
            if self._file is None or self._filled[-1] == SHARD_TOKENS:
                self.close()
                self._file = self._unfinished(len(self._filled)).open("wb")
                self._filled.append(0)
            part, values = np.split(values, [SHARD_TOKENS - self._filled[-1]])
            content = part.astype(self._dtype).tobytes()
            self._file.write(content)
            self.sha256.update(content)
            self._filled[-1] += len(part)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def finish(self) -> tuple[Shard, ...]:
        """Gives the files their final names, which have their number, and returns them."""
        shards = []
        for i, filled in enumerate(self._filled):
            shard = Shard(f"{self._name}-{i:05d}-of-{len(self._filled):05d}{self._suffix}", filled)
            self._unfinished(i).rename(self._folder / shard.name)
            shards.append(shard)
        return tuple(shards)

    def _unfinished(self, i: int) -> Path:
        return self._folder / f"{self._name}-{i:05d}{self._suffix}"


class TokenFiles:
    """The token ids of one split, read from its shards as if they were one array, and what of them is to be learnt."""

    def __init__(self, folder: AnyPath, split: Split, dtype: str) -> None:
        """Raises UserError when a file is missing or has another size than `split` says."""
        self.n_bytes = split.bytes
        self._len = split.tokens
        token_type = np.dtype(dtype).newbyteorder("<")
        self._shards = [map_file(folder / shard.name, token_type, shard.tokens) for shard in split.shards]
        self.n_learnt = split.learnt
        self._masks = [
            map_file(folder / mask_name(shard.name), np.dtype(np.uint8), shard.tokens)
            for shard in (split.shards if split.learnt is not None else ())
        ]
        self._starts = list(itertools.accumulate((shard.tokens for shard in split.shards), initial=0))
        self.document_starts = map_file(folder / split.documents_file, np.dtype("<u8"), split.documents)[:]

    def __len__(self) -> int:
        """Number of tokens."""
        return self._len

    @property
    def is_remote(self) -> bool:
        """True if reading may wait for a network."""
        return any(isinstance(shard, RemoteArray) for shard in self._shards)

    @property
    def masked(self) -> bool:
        """True if there is a mask: only some of the tokens are to be learnt."""
        return self.n_learnt is not None

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that are to be learnt for a byte of their text."""
        return (len(self) if self.n_learnt is None else self.n_learnt) / self.n_bytes

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count - 1`, int32 (count,). Raises IndexError outside of the split."""
        return self._read(self._shards, start, count).astype(np.int32)

    def read_learnt(self, start: int, count: int) -> np.ndarray:
        """For each of these tokens, whether it is to be learnt, bool (count,). Only with a mask."""
        return self._read(self._masks, start, count).astype(bool)

    def _read(self, files: Sequence[np.ndarray | RemoteArray], start: int, count: int) -> np.ndarray:
        if not 0 <= start <= start + count <= self._len:
            raise IndexError(f"tokens {start} to {start + count} of {self._len}")
        i = bisect.bisect_right(self._starts, start, hi=len(files)) - 1
        offset = start - self._starts[i]
        part = files[i][offset : offset + count]
        if len(part) == count:
            return part
        return np.concatenate((part, self._read(files, start + len(part), count - len(part))))


def mask_name(shard: str) -> str:
    """The name of the mask beside a shard."""
    return shard.removesuffix(".bin") + ".learnt.bin"


def map_file(path: AnyPath, dtype: np.dtype, count: int) -> "np.ndarray | RemoteArray":
    """A file as an array (count,) of which slices are read: memory-mapped, or by ranges from afar. Raises UserError
    when its size is wrong."""
    expected = count * dtype.itemsize
    try:
        size = path.stat().st_size
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); prepare the data again") from e
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}; prepare the data again")
    if isinstance(path, RemotePath):
        return RemoteArray(path, dtype, count)
    # A plain view: slicing a np.memmap itself takes several times as long.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class Dataset:
    """A data folder, open for reading."""

    folder: AnyPath
    meta: Meta
    tokenizer: Tokenizer
    train: TokenFiles
    val: TokenFiles

    def split(self, name: SplitName) -> TokenFiles:
        """One of both splits."""
        return self.train if name == "train" else self.val

    def check_format(self, objective: str) -> None:
        """Raises UserError when an objective learns from data of another format."""
        if self.meta.format not in FORMATS[objective]:
            own = next((name for name, formats in FORMATS.items() if self.meta.format in formats), "unknown")
            raise UserError(
                f"{self.folder} is a {self.meta.format} set; its objective is {own}, and {objective} needs "
                f"{' or '.join(FORMATS[objective])}: name another folder, or prepare one with --format"
            )

    def check_unchanged(self) -> None:
        """Raises UserError when the folder was replaced since its meta.json was read."""
        if load_meta(self.folder) != self.meta:
            raise UserError(f"{self.folder} was replaced while it was opened; start again")


def save_meta(folder: Path, meta: Meta) -> None:
    """Writes `meta.json`, the last file, because it marks a complete folder."""
    save_json(folder / META_FILE, dataclasses.asdict(meta))


def load_meta(folder: AnyPath) -> Meta:
    """Reads `meta.json`. Raises UserError when it is missing, damaged or of another version."""
    path = folder / META_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values["format_version"]) not in FORMAT_VERSIONS.values():
            known = " or ".join(map(str, FORMAT_VERSIONS.values()))
            raise UserError(f"{path} is of format {version}, not {known}; prepare it again")
        for split in SPLITS:
            shards = tuple(Shard(**shard) for shard in values[split].pop("shards"))
            values[split] = Split(**values[split], shards=shards)
        return Meta(**values)
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists():
            raise UserError(
                f"{folder} is not a data folder: it has no {META_FILE}; "
                f"make one with: {command_line('prepare', 'SOURCE', '--out', 'DIR')}"
            ) from None
        raise missing(folder, f"; make it with: {command_line('prepare', 'SOURCE', '--out', folder)}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}); prepare the data again") from e


def missing(folder: AnyPath, advice: str) -> UserError:
    """Says that there is no such data folder, what to do, and which folder the user may have meant."""
    if isinstance(folder, RemotePath):
        suggestion = f"; did you mean {sibling}?" if (sibling := folder.sibling_like()) else ""
        return UserError(f"there is no data folder {folder}{advice}{suggestion}")
    absolute = folder.absolute()
    there = next(parent for parent in absolute.parents if parent.is_dir())
    wanted = absolute.relative_to(there)
    is_root = there == there.parent  # Below which is the whole machine.
    metas = () if is_root else there.glob("/".join(["*"] * len(wanted.parts) + [META_FILE]))
    near = difflib.get_close_matches(str(wanted), (str(meta.parent.relative_to(there)) for meta in metas), n=1)
    place = there if folder.is_absolute() else os.path.relpath(there)
    suggestion = f"; did you mean {Path(place, near[0])}?" if near else ""
    return UserError(f"there is no data folder {folder}{advice}{suggestion}")


def open_dataset(folder: AnyPath) -> Dataset:
    """Opens the data folder that `prepare` made.

    Raises UserError when it is no data folder, when a file is missing or of the wrong size, when the tokenizer is not
    the one that made the tokens, and when the folder is replaced meanwhile.
    """
    meta = load_meta(folder)
    with local_copy(folder, without=(".bin", ".jsonl")) as local:
        tokenizer = load_tokenizer(local / meta.tokenizer_file)
    if tokenizer.fingerprint != meta.tokenizer_fingerprint:
        raise UserError(f"{folder / meta.tokenizer_file} is not what the tokens were made with; prepare the data again")
    train, val = (TokenFiles(folder, split, meta.dtype) for split in (meta.train, meta.val))
    data = Dataset(folder, meta, tokenizer, train, val)
    data.check_unchanged()
    return data
