"""What `data` prepares: files of texts and of conversations, of any size, made of the documentation inside Python."""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from gpt_jax.data.corpora import python_docs

LETTERS = str.maketrans("0123456789abcdef", "etaoinshrdlucmfw")


@cache
def docstrings() -> dict[str, str]:
    """The docstrings of the standard library, each with the name of the first thing that it documents."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_path("stdlib"))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for module in sorted(sys.stdlib_module_names - {"test"}):
        for path in filter(Path.is_file, (root / f"{module}.py", *sorted((root / module).rglob("*.py")))):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # Some files are templates of code generators.
                continue
            for node in ast.walk(tree):
                if isinstance(node, documented) and (text := ast.get_docstring(node)):
                    found.setdefault(text, f"{module}.{getattr(node, 'name', path.stem)}")
    return found


def write_docstrings(path: Path) -> None:
    """JSON Lines with a document for each docstring."""
    write(path, ({"text": text} for text in docstrings()))


def write_texts(path: Path, n_bytes: int) -> None:
    """JSON Lines of `n_bytes` or a little more: the built-in python-docs over and over, see `varied`."""
    documents, rng = [document.split(" ") for document in python_docs()], random.Random(0)
    write(path, ({"text": varied(document, rng)} for _ in count() for document in documents), n_bytes)


def write_conversations(path: Path, n_bytes: int, answer: int = 3) -> None:
    """JSON Lines of `n_bytes` or a little more, in Alpaca's format: questions about Python, answered with so many
    docstrings, over and over, see `varied`. With three, a record has 0.7 kB, about as Alpaca's."""
    texts, names, rng = [text.split(" ") for text in docstrings()], list(docstrings().values()), random.Random(0)

    def records() -> Iterator[dict[str, str]]:
        for i in (i for _ in count() for i in range(0, len(texts) - answer, answer)):
            question = f"What are {', '.join(names[i : i + answer])} for?"
            output = "\n\n".join(varied(text, rng) for text in texts[i : i + answer])
            yield {"instruction": question, "input": "", "output": output}

    write(path, records(), n_bytes)


def write_documents(path: Path, n_documents: int, mean: int) -> None:
    """JSON Lines with documents of exponentially distributed lengths, of `mean` tokens if a byte is one and one ends
    the document: pieces of python-docs."""
    text, rng = "".join(python_docs()).encode("ascii", "ignore").decode(), random.Random(0)

    def piece() -> str:
        size = 1 + int(rng.expovariate(1 / (mean - 1.5)))
        start = rng.randrange(len(text) - size)
        return text[start : start + size]

    write(path, ({"text": piece()} for _ in range(n_documents)))


def varied(words: list[str], rng: random.Random) -> str:
    """The words as a text, one in twenty replaced by one that was never seen.

    Otherwise the cache of words would know all of it. That share is an assumption; text that brings fewer new words is
    tokenised faster, text that brings more is tokenised slower.
    """
    words = words.copy()
    for i in rng.choices(range(len(words)), k=len(words) // 20):
        words[i] = f"{rng.getrandbits(40):x}".translate(LETTERS)
    return " ".join(words)


def write(path: Path, records: Iterator[dict[str, Any]], n_bytes: float = float("inf")) -> None:
    """JSON Lines of these records, until the file has `n_bytes`."""
    with path.open("w", encoding="utf-8") as f:
        for record in takewhile(lambda _: f.tell() < n_bytes, records):
            f.write(json.dumps(record) + "\n")
