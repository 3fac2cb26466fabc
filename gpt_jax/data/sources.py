"""The corpus of documents that a user names by files, folders, globs and built-in corpora."""

import difflib
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.data.corpora import python_docs, shakespeare
from gpt_jax.data.formats import Block, cut_document, has_text, read_blocks
from gpt_jax.data.shards import META_FILE
from gpt_jax.errors import UserError


def _python_docs_blocks() -> Iterator[Block]:
    position = 0
    for document in python_docs():
        text = document.encode()
        position += len(text)
        yield from cut_document(text, position)


@dataclass(frozen=True)
class Source:
    """One file, or a built-in corpus that is generated while it is read."""

    n_bytes: int  # Of the file, before unpacking.
    read: Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, which can be read repeatedly and are never whole in memory."""

    sources: tuple[Source, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes to read, before unpacking."""
        return sum(source.n_bytes for source in self.sources)

    def blocks(self, progress: Callable[[int], object]) -> Iterator[Block]:
        """The blocks of all documents. `progress` is called with the bytes read since its last call.

        Raises UserError naming the file that cannot be read as text.
        """
        for source in self.sources:
            position = 0
            for block in source.read():
                progress(block.position - position)
                position = block.position
                yield block
            progress(source.n_bytes - position)


def open_corpus(names: Iterable[str], text_field: str = "text") -> Corpus:
    """The corpus of the files, folders, globs and built-in corpora in `names`, in their order.

    A folder stands for all files below it in sorted order, without hidden ones. Data folders and binary and empty files
    below it are skipped with a note on stderr, but naming such a file itself is an error. A file that is named twice is
    read once. A path takes precedence over a built-in corpus of the same name.
    Raises UserError for a name that is none of these, and for a folder or glob without text.
    """
    sources: dict[str, Source] = {}
    for name in names:
        try:
            if name == "python-docs" and not Path(name).exists():
                n_bytes = sum(len(document.encode()) for document in python_docs())
                sources[name] = Source(n_bytes, _python_docs_blocks)
                continue
            paths = [shakespeare()] if name == "shakespeare" and not Path(name).exists() else _files(name)
            for path in paths:
                sources.setdefault(os.path.realpath(path), _file_source(path, text_field))
        except OSError as e:
            raise UserError(f"{e.filename or name!r} cannot be read ({e.strerror or e})") from e
    return Corpus(tuple(sources.values()))


def _file_source(path: Path, text_field: str) -> Source:
    return Source(path.stat().st_size, lambda: read_blocks(path, text_field))


def _files(name: str) -> list[Path]:
    """The files that `name` stands for."""
    path = Path(name)
    if path.is_dir():
        return _files_below(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"{path} is not a regular file; text is read twice, so save it to one first")
    if glob.has_magic(name):
        # Path.glob takes no absolute pattern, and matches hidden files.
        found = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]  # noqa: PTH207
        if not found:
            raise UserError(f"no file matches {name!r} in {Path.cwd()}")
        return found
    raise UserError(f"there is no file or folder {name!r}{_suggestion(path)}")


def _suggestion(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, [*siblings, "python-docs", "shakespeare"], n=1)
    if not matches:
        return "; the built-in corpora are python-docs and shakespeare"
    return f"; did you mean {path.parent / matches[0] if matches[0] in siblings else matches[0]}?"


def _files_below(folder: Path) -> list[Path]:
    def refuse(e: OSError) -> None:
        raise e

    found: list[Path] = []
    skipped: list[Path] = []
    prepared: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        if META_FILE in names and any(name.endswith(".bin") for name in names):
            prepared.append(Path(parent))
            subfolders.clear()
            continue
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.is_file():
                (found if has_text(path) else skipped).append(path)
    for kind, paths in (("empty or binary file", skipped), ("data folder", prepared)):
        if paths:
            n, example = len(paths), min(paths)
            print(f"{folder}: passed over {n} {kind}{'s' * (n > 1)}, such as {example}", file=sys.stderr)
    if not found:
        raise UserError(f"there is no text in the folder {folder}")
    return sorted(found)
