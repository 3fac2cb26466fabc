"""The corpus of documents that a user names by files, folders, globs, datasets and built-in corpora."""

import difflib
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from gpt_jax.data.corpora import python_docs, shakespeare
from gpt_jax.data.formats import RECORDS, Block, Kind, cut_document, kind_of, read_blocks, read_records, record_blocks
from gpt_jax.data.hugging_face import HubDataset, is_dataset, load_dataset
from gpt_jax.data.records import OnBroken, Record
from gpt_jax.data.shards import META_FILE
from gpt_jax.errors import UserError
from gpt_jax.storage.files import sibling_like
from gpt_jax.storage.remote import AnyPath, RemotePath, location


def _python_docs_blocks() -> Iterator[Block]:
    position = 0
    for document in python_docs():
        text = document.encode()
        position += len(text)
        yield from cut_document(text, position)


BUILT_IN = ("python-docs", "shakespeare")
Notes = dict[str, list[AnyPath]]
"""What was passed over, by the text that says so."""


PART_BYTES = 64 << 20
PART_SOURCES = 10_000


@dataclass(frozen=True)
class Source:
    """One file, a dataset, or a built-in corpus that is generated while it is read. It can be pickled."""

    n_bytes: int  # Of the file, before unpacking, or of the dataset in memory.
    is_remote: bool  # Whether every machine can read it.
    blocks: Callable[[], Iterator[Block]]
    records: Callable[[OnBroken], Iterator[Record]]


class Placed(Protocol):
    """What a source gives, one after the other."""

    @property
    def position(self) -> int:
        """Bytes of the source read so far."""


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True)
class Corpus:
    """Documents or records in a fixed order, which can be read repeatedly and are never whole in memory."""

    sources: tuple[Source, ...]
    first: int = 0  # In a part of a corpus, the number of its first source.

    @property
    def n_bytes(self) -> int:
        """Bytes to read, before unpacking."""
        return sum(source.n_bytes for source in self.sources)

    def parts(self) -> list["Corpus"]:
        """The corpus in parts of PART_BYTES or PART_SOURCES, if its sources are smaller. No source is cut."""
        parts, start, n_bytes = list[Corpus](), 0, 0
        for end, source in enumerate(self.sources, 1):
            n_bytes += source.n_bytes
            if n_bytes >= PART_BYTES or end - start == PART_SOURCES or end == len(self.sources):
                parts.append(Corpus(self.sources[start:end], self.first + start))
                start, n_bytes = end, 0
        return parts

    def each(self) -> Iterator[tuple[int, "Corpus"]]:
        """Each source alone, with its number."""
        for number, source in enumerate(self.sources, self.first):
            yield number, Corpus((source,), number)

    def blocks(self, progress: Callable[[int], object]) -> Iterator[Block]:
        """The blocks of all documents. `progress` is called with the bytes read since its last call.

        Raises UserError naming the file that cannot be read as text.
        """
        return self._read(progress, lambda source: source.blocks())

    def records(self, progress: Callable[[int], object], on_broken: OnBroken) -> Iterator[Record]:
        """All records, as `blocks` gives texts. on_broken: see `records`."""
        return self._read(progress, lambda source: source.records(on_broken))

    def _read(self, progress: Callable[[int], object], read: Callable[[Source], Iterator[P]]) -> Iterator[P]:
        for source in self.sources:
            position = 0
            for item in read(source):
                progress(item.position - position)
                position = item.position
                yield item
            progress(source.n_bytes - position)


def open_corpus(names: Iterable[str], text_field: str = "text", of_records: bool = False) -> Corpus:
    """The corpus of the files, folders, globs, datasets and built-in corpora in `names`, in their order.

    All but the corpora and datasets may be remote, as in s3://bucket/folder/*.txt. A folder stands for all files below
    it in sorted order, without hidden ones; links are followed. What is no text below it is passed over with a note on
    stderr, but naming such a file itself is an error. A file that is named twice is read once. A path takes precedence
    over a built-in corpus of the same name. Datasets are spelled as in `hugging_face.SPELLING`. of_records: what has no
    records is passed over, too.
    Raises UserError for a name that is none of these, and for a folder or glob without text.
    """
    sources: dict[str, Source] = {}
    for name in names:
        notes: Notes = {}
        try:
            if name == "python-docs" and not Path(name).exists():
                n_bytes = sum(len(document.encode()) for document in python_docs())
                sources[name] = Source(n_bytes, False, _python_docs_blocks, _no_records)
                continue
            if is_dataset(name):
                sources[name] = _dataset_source(name, text_field)
                continue
            paths: list[AnyPath]
            paths = [shakespeare()] if name == "shakespeare" and not Path(name).exists() else _files(name, notes)
            found = 0
            for path in paths:
                kind = kind_of(path, None if of_records else text_field)
                passed_over = PASSED_OVER if not of_records or kind in RECORDS else {kind: NO_RECORDS, **PASSED_OVER}
                if kind in passed_over and location(name).is_dir():
                    notes.setdefault(passed_over[kind], []).append(path)
                    continue
                if kind == "unlike":
                    notes.setdefault(UNLIKE, []).append(path)
                identity = str(path) if isinstance(path, RemotePath) else os.path.realpath(path)
                sources.setdefault(identity, _file_source(path, text_field))
                found += 1
        except OSError as e:
            raise UserError(f"{e.filename or name!r} cannot be read ({e.strerror or e})") from e
        for what in [what for what in NOTES if what in notes]:
            n, example = len(notes[what]), min(notes[what], key=lambda path: str(path).split("/"))
            count = what.format(n=n, s="s" * (n > 1), field=text_field)
            print(f"{name}: {count}, such as {example}", file=sys.stderr)
        if not found:
            raise UserError(f"there {'are no records' if of_records else 'is no text'} in the folder {name}")
    return Corpus(tuple(sources.values()))


PASSED_OVER: dict[Kind, str] = {
    "empty": "passed over {n} empty or binary file{s}",
    "binary": "passed over {n} empty or binary file{s}",
    "unreadable": "passed over {n} file{s} that cannot be opened",
}
"""What is passed over in a folder."""

NO_RECORDS = "passed over {n} file{s} without records"
DATA_FOLDER = "passed over {n} data folder{s}"
DANGLING = "passed over {n} dangling link{s}"
SPECIAL = "passed over {n} pipe{s}, socket{s} or device{s}"
FOLDER = "passed over {n} folder{s}, which ** would go into"
UNLIKE = "{n} file{s} like JSON or tables, not records with a field {field!r} (see prepare --text-field), read as text"
NOTES = (*dict.fromkeys(PASSED_OVER.values()), NO_RECORDS, DATA_FOLDER, DANGLING, SPECIAL, FOLDER, UNLIKE)
"""All notes, in the order in which they are printed."""


def _file_source(path: AnyPath, text_field: str) -> Source:
    return Source(
        path.stat().st_size,
        isinstance(path, RemotePath),
        partial(read_blocks, path, text_field),
        partial(read_records, path, None),
    )


def _no_records(_: OnBroken) -> Iterator[Record]:
    raise UserError("python-docs holds texts, no records; name a file with them")


def _dataset_source(name: str, text_field: str) -> Source:
    dataset = load_dataset(name)
    return Source(
        dataset.n_bytes, False, partial(_dataset_blocks, dataset, text_field), partial(_dataset_records, dataset)
    )


def _dataset_blocks(dataset: HubDataset, text_field: str) -> Iterator[Block]:
    for record in dataset.records([text_field]):
        yield from record_blocks(record, text_field)


def _dataset_records(dataset: HubDataset, _: OnBroken) -> Iterator[Record]:
    return dataset.records()


def first_record(names: Iterable[str]) -> Record | None:
    """The first record in these sources (see open_corpus); None when there is none, or it cannot be read."""
    for name in names:
        if is_dataset(name):
            return next(load_dataset(name).records(), None)
        if name not in BUILT_IN or Path(name).exists():
            with suppress(OSError):
                for path in _files(name, {}):
                    with suppress(UserError):
                        if kind_of(path, None) in RECORDS:
                            return next(read_records(path), None)
    return None


def _files(name: str, notes: Notes) -> list[AnyPath]:
    """The files that `name` stands for. What is passed over is added to `notes`."""
    path = location(name)
    if isinstance(path, RemotePath):
        return [*_remote_files(path, notes)]
    if path.is_dir():
        return [*_files_below(path, notes)]
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"{path} is not a regular file; text is read twice, so save it to one first")
    if path.is_symlink():
        raise UserError(f"{path} is a dangling link, to {path.readlink()}")
    if glob.has_magic(name):
        # Path.glob takes no absolute pattern, and matches hidden files.
        matches = [Path(p) for p in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        found = [match for match in matches if match.is_file()]
        if not found:
            raise UserError(f"no file matches {name!r} in {Path.cwd()}")
        for match in matches:
            if not match.is_file() and not (match.is_dir() and "**" in name):
                notes.setdefault(FOLDER if match.is_dir() else _no_file(match), []).append(match)
        return [*found]
    raise UserError(f"there is no file or folder {name!r}{_suggestion(path)}")


def _remote_files(path: RemotePath, notes: Notes) -> list[RemotePath]:
    """See _files."""
    if path.is_file():
        return [path]
    if glob.has_magic(path.url):
        if found := path.glob():
            return found
        raise UserError(f"no file matches {path}")
    found = path.files()
    if not found:
        near = path.sibling_like()
        raise UserError(f"there is no file or folder {path}" + (f"; did you mean {near}?" if near else ""))
    shards = {file.parent for file in found if file.suffix == ".bin"}
    data_folders = {file.parent for file in found if file.name == META_FILE} & shards
    notes.update({DATA_FOLDER: [*data_folders]} if data_folders else {})
    inside = tuple(f"{folder}/" for folder in data_folders)
    return [f for f in found if not f.url.startswith(inside) and "/." not in f.url.removeprefix(path.url)]


def _no_file(path: Path) -> str:
    return SPECIAL if path.exists() else DANGLING


def _suggestion(path: Path) -> str:
    built_in = difflib.get_close_matches(path.name, BUILT_IN, n=1)
    if near := sibling_like(path) or next(iter(built_in), None):
        return f"; did you mean {near}?"
    return "; the built-in corpora are python-docs and shakespeare"


def _files_below(folder: Path, notes: Notes) -> list[Path]:
    """All regular files below a folder, in sorted order. Links to folders are followed after the folders themselves,
    and a folder that was seen already, such as one that holds the link, is not read again."""

    def refuse(e: OSError) -> None:
        raise e

    found: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        for parent, subfolders, names in os.walk(waiting.pop(0), onerror=refuse):
            if os.path.realpath(parent) in seen:
                subfolders.clear()
                continue
            seen.add(os.path.realpath(parent))
            if META_FILE in names and any(name.endswith(".bin") for name in names):
                notes.setdefault(DATA_FOLDER, []).append(Path(parent))
                subfolders.clear()
                continue
            # Sorted, since of several links to one folder the first gives its files their paths.
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            waiting += [path for s in subfolders if (path := Path(parent, s)).is_symlink()]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                if path.is_file():
                    found.append(path)
                else:
                    notes.setdefault(_no_file(path), []).append(path)
    return sorted(found)
