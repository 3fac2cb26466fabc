"""The built-in corpora: the documentation inside every Python, and tiny Shakespeare, which is downloaded."""

import ast
import hashlib
import http.client
import inspect
import os
import re
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.system import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Parts of the standard library whose docstrings say little in English: test suites, tables, vendored wheels, demos.
_SKIPPED_FOLDERS = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@cache
def python_docs() -> tuple[str, ...]:
    """The documentation inside the running Python: almost 2 MB of English in sorted order, without a network.

    One document for each topic of the language reference, then one for each module of the standard library: its name,
    its docstring, and the docstrings of its public classes and functions under their signatures. The modules are
    parsed, never imported. Raises UserError when Python was installed without docstrings.
    """
    documents = _topic_documents()
    root = Path(sysconfig.get_path("stdlib"))
    documents += filter(None, (_module_document(root, path) for path in _modules(root)))
    if not documents:
        raise UserError(f"this Python has no documentation in {root}; name a text file or a folder instead")
    return tuple(documents)


def _topic_documents() -> list[str]:
    """The topics of `help()`, without those that are a section of another, which could be in both splits."""
    from pydoc_data.topics import topics

    texts = [_without_tables(_clean(topics[name])) for name in sorted(topics)]
    # Sections are compared without their titles, whose underlines depend on the depth.
    bodies = [re.sub(r"\A.*\n\W+\n", "", text) for text in texts]
    return [
        f"{text}\n"
        for i, (text, body) in enumerate(zip(texts, bodies, strict=True))
        if not any(body in other and (body != other or j < i) for j, other in enumerate(bodies) if j != i)
    ]


def _modules(root: Path) -> list[Path]:
    """Source files of the public modules under `root`, and of _pydecimal, _pyio..., which document modules in C."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith(("_", "config-"))]
        found += [Path(folder, n) for n in names if n.endswith(".py") and (n.startswith("_py") or _is_public(n))]
    return sorted(found)


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__.py"


def _module_document(root: Path, path: Path) -> str:
    """The documentation of one module as text; empty where it has none."""
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts).removeprefix("_py")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # Some files are templates of code generators.
        return ""
    sections = list(_sections(tree, name))
    return "\n".join(f"{heading}\n\n{text}\n" for heading, text in sections)


def _sections(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """(heading, text) of a module's or class's docstring and of everything public in it, in the order of the source."""
    if isinstance(node, ast.Module) and (text := _prose(node)):
        yield name, text
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            qualified = f"{name}.{child.name}"
            if text := _prose(child):
                yield _signature(child, qualified), text
            if isinstance(child, ast.ClassDef):
                yield from _sections(child, qualified)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _prose(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The docstring of `node` when it reads as English, else an empty string."""
    text = _clean(ast.get_docstring(node, clean=False) or "")
    words = re.findall(r"[A-Za-z]{2,}", text)
    letters = sum(map(len, words))
    return text if len(words) >= 4 and letters > len(text.replace(" ", "")) / 2 else ""


def _clean(text: str) -> str:
    """`text` without common indentation, tabs, trailing spaces and runs of blank lines."""
    lines = (line.rstrip() for line in inspect.cleandoc(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _without_tables(text: str) -> str:
    return re.sub(r"(?m)^ *[|+].*[|+]\n", "", text)


def shakespeare() -> Path:
    """Karpathy's tiny Shakespeare (1.1 MB), downloaded to the user's cache folder the first time.

    Raises UserError when it cannot be downloaded or written, or has an unexpected checksum.
    """
    path = cache_folder() / "tinyshakespeare.txt"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return path
    advice = "download it some other way and name your copy instead of the corpus"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            text = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"{SHAKESPEARE_URL} could not be downloaded ({e}); {advice}") from e
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(f"{SHAKESPEARE_URL} has the checksum {digest}, not {SHAKESPEARE_SHA256}; {advice}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(text)
        Path(f.name).replace(path)
    except OSError as e:
        raise UserError(f"{path} could not be written ({e}); {advice}") from e
    return path
