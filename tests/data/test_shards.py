"""What is written comes back, whatever the shards; files that are missing, cut short or mixed up are named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import shards
from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import SplitWriter, TokenFiles, load_meta, mask_name, open_dataset, token_dtype
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.bytes import ByteTokenizer

END = 0


@given(
    documents=st.lists(st.lists(st.integers(1, 60_000), max_size=12), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 40),
    write_size=st.integers(1, 50),
    vocab_size=st.sampled_from([65_536, 65_537]),
    data=st.data(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    write_size: int,
    vocab_size: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.array([token for document in documents for token in (*document, END)])
    learnt, masked = tokens % 3 == 0, data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch, SplitWriter(folder, "val", vocab_size, masked) as writer:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        for i in range(0, len(tokens), write_size):
            part = slice(i, i + write_size)
            writer.write(tokens[part], np.flatnonzero(tokens[part] == END) + 1, learnt[part] if masked else None)
        split = writer.finish(n_bytes=123)
    assert [s.tokens for s in split.shards] == [
        len(p) for p in np.split(tokens, range(shard_tokens, len(tokens), shard_tokens))
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [split.documents_file, *(s.name for s in split.shards), *(mask_name(s.name) for s in split.shards if masked)]
    )

    files = TokenFiles(folder, split, token_dtype(vocab_size).name)
    assert (len(files), files.n_bytes, split.documents) == (len(tokens), 123, len(documents))
    start = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - start))
    read = files.read(start, count)
    assert read.dtype == np.int32
    assert np.array_equal(read, tokens[start : start + count])
    assert (files.masked, files.n_learnt) == (masked, int(learnt.sum()) if masked else None)
    if masked:
        mask = files.read_learnt(start, count)
        assert mask.dtype == bool
        assert np.array_equal(mask, learnt[start : start + count])
    assert files.document_starts.tolist() == [0, *(np.flatnonzero(tokens == END)[:-1] + 1)]
    for start, count in ((-1, 1), (0, len(tokens) + 1), (len(tokens) + 1, 0)):
        with pytest.raises(IndexError):
            files.read(start, count)


def test_full_shards_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand shards must not need a thousand descriptors."""
    opened: list[IO[Any]] = []
    open_path = Path.open

    def remember(path: Path, *args: Any) -> IO[Any]:
        opened.append(open_path(path, *args))
        return opened[-1]

    monkeypatch.setattr(Path, "open", remember)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    with SplitWriter(tmp_path, "train", 100) as writer:
        writer.write(np.ones(95, np.int32), np.array([], np.int64))
        writer.write(np.ones(100, np.int32), np.array([], np.int64))
        assert [file.closed for file in opened] == [False] + 19 * [True] + [False]  # Starts, full shards, the last one.
    assert all(file.closed for file in opened)


def test_ids_are_small_where_the_vocabulary_allows_it() -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == (np.dtype("<u2"), np.dtype("<u4"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder."""
    (tmp_path / "a.txt").write_text("some words " * 100)
    prepare(PrepareArgs(source=(str(tmp_path / "a.txt"),), out=tmp_path / "data", tokenizer="bytes", workers=1))
    return tmp_path / "data"


def test_a_data_folder_is_opened(folder: Path) -> None:
    data = open_dataset(folder)
    tokens = np.concatenate([data.train.read(0, len(data.train)), data.val.read(0, len(data.val))])
    assert data.tokenizer.decode(tokens.tolist()).replace("<|endoftext|>", "") == "some words " * 100
    assert data.train.n_bytes + data.val.n_bytes == 1100
    assert data.meta == load_meta(folder)
    assert data.meta.vocab_size == data.tokenizer.vocab_size


def change_meta(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **values}))

    return change


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


SHARD = "train-00000-of-00001.bin"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / SHARD).write_bytes(b"\0" * 99),
            f"{SHARD} has 99 bytes instead of 1980; prepare the data again",
        ),
        (lambda f: append_byte(f / SHARD), f"{SHARD} has 1981 bytes instead of 1980"),
        (lambda f: (f / SHARD).unlink(), rf"{SHARD} cannot be read \(No such file or directory\); prepare"),
        (lambda f: append_byte(f / "val-documents.bin"), "val-documents.bin has 9 bytes instead of 8"),
        (
            lambda f: (f / "meta.json").unlink(),
            "data is not a data folder: it has no meta.json; make one with: .*prepare",
        ),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
        (change_meta(train={}), "meta.json is damaged"),
        (change_meta(extra=1), "meta.json is damaged"),
        (change_meta(format_version=99), "meta.json is of format 99, not 1 or 2 or 3; prepare it again"),
        (change_meta(tokenizer_fingerprint="0"), "tokenizer.json is not what the tokens were made with"),
        (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer .*tokenizer.json"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_dataset(folder)


def test_a_folder_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(tmp_path / "not here")
    folder = tmp_path / "not here"
    told = f"there is no data folder {folder}; make it with: "
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith(f"-m gpt_jax prepare SOURCE --out '{folder}'")


def test_the_whole_machine_is_not_searched_for_a_mistyped_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("the root was searched"))
    with pytest.raises(UserError, match="there is no data folder /not here/a/b; make it with: "):
        open_dataset(Path("/not here/a/b"))


def test_meta_is_json_of_the_dataclass(folder: Path) -> None:
    meta = load_meta(folder)
    values = json.loads((folder / "meta.json").read_text())
    assert values == json.loads(json.dumps(dataclasses.asdict(meta)))
    assert values["tokenizer_fingerprint"] == ByteTokenizer().fingerprint
