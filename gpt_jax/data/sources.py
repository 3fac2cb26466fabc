"""What to read: files, folders, globs and built-in corpora, as the user names them, to a corpus of documents."""

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
    """One file, or a corpus that is made up on the way."""

    n_bytes: int  # On the disk.
    read: Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, which can be read as often as needed, never whole in memory."""

    sources: tuple[Source, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes to read from the disk."""
        return sum(source.n_bytes for source in self.sources)

    def blocks(self, progress: Callable[[int], object]) -> Iterator[Block]:
        """The blocks of all documents. `progress` is told the bytes read since it was last called.

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
    """The corpus of what `names` name, in their order: files, folders, globs and built-in corpora.

    A folder stands for the files in it and below in sorted order, without hidden ones; data folders and binary and
    empty files there are passed over, with a note on stderr, while such a file that is named itself is an error. A file
    that is named twice is read once. A name that is both a path and a built-in corpus means the path.
    Raises UserError for a name that is none of these, and for a folder or glob that has no text.
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
        # Path.glob would take no absolute pattern, and would match hidden files.
        found = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]  # noqa: PTH207
        if not found:
            raise UserError(f"no file matches {name!r} in {Path.cwd()}")
        return found
    raise UserError(f"there is no file or folder {name!r}{_suggestion(path)}")


def _suggestion(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, "python-docs", "shakespeare"], n=1)
    if not near:
        return "; the built-in corpora are python-docs and shakespeare"
    return f"; did you mean {path.parent / near[0] if near[0] in siblings else near[0]}?"


def _files_below(folder: Path) -> list[Path]:
    def refuse(e: OSError) -> None:
        raise e

    found: list[Path] = []
    passed_over: list[Path] = []
    prepared: list[Path] = []
    for where, subfolders, names in os.walk(folder, onerror=refuse):
        if META_FILE in names and any(name.endswith(".bin") for name in names):
            prepared.append(Path(where))
            subfolders.clear()
            continue
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for path in (Path(where, name) for name in names if not name.startswith(".")):
            if path.is_file():
                (found if has_text(path) else passed_over).append(path)
    for what, paths in (("empty or binary file", passed_over), ("data folder", prepared)):
        if paths:
            n, example = len(paths), min(paths)
            print(f"{folder}: passed over {n} {what}{'s' * (n > 1)}, such as {example}", file=sys.stderr)
    if not found:
        raise UserError(f"there is no text in the folder {folder}")
    return sorted(found)
