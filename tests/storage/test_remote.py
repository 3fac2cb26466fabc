"""Remote files are read as local ones are; failures that pass change nothing, and others end in one line."""

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.storage import remote
from gpt_jax.storage.folders import UNFINISHED, check_remote_replaceable, upload, whole_remote_folder
from gpt_jax.storage.ranged import BlockCache, RemoteArray
from gpt_jax.storage.remote import RemotePath, is_remote, location
from tests.storage.failing import Failing, Fails, make_fail
from tests.storage.s3 import s3_server

CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> RemotePath:
    """An empty folder of each of two backends."""
    if request.param == "memory":
        path: RemotePath = request.getfixturevalue("memory")
        return path
    return RemotePath(f"{request.getfixturevalue('s3')}/{request.node.originalname}")


@pytest.fixture
def memory() -> RemotePath:
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs.clear()
    return RemotePath("memory://bucket")


def write(path: RemotePath, content: bytes = CONTENT) -> RemotePath:
    """The path, with this content."""
    path.request("written", lambda fs, name: fs.pipe_file(name, content))
    return path


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], tuple[Failing, list[float]]]:
    """See make_fail."""
    return lambda fails: make_fail(monkeypatch, fails)


def test_an_address_is_told_from_a_name() -> None:
    assert [
        name for name in ("s3://b/x", "a", "/a:b", "file:///a", "C:\\a", "hf://datasets/a/b") if is_remote(name)
    ] == [
        "s3://b/x",
        "hf://datasets/a/b",
    ]
    assert location("file:///a/b") == Path("/a/b")
    assert location("s3://b/x/") == RemotePath("s3://b/x")
    with pytest.raises(UserError, match="s3:// is no whole address"):
        location("s3://")
    with pytest.raises(UserError, match="s3:/b/x is no address; did you mean s3://b/x"):
        location("s3:/b/x")


def test_parts_of_a_path() -> None:
    path = RemotePath("s3://bucket/folder") / "a.jsonl.gz"
    assert (str(path), path.name, path.stem, path.suffix) == (
        "s3://bucket/folder/a.jsonl.gz",
        "a.jsonl.gz",
        "a.jsonl",
        ".gz",
    )
    assert path.parent.parent == path.parent.parent.parent == RemotePath("s3://bucket")


def test_a_file_is_read_as_a_local_one(root: RemotePath, tmp_path: Path) -> None:
    path, local = write(root / "a.bin"), tmp_path / "a.bin"
    local.write_bytes(CONTENT)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_size == len(CONTENT)
    assert (path.is_file(), path.is_dir(), root.is_dir(), (root / "b").exists()) == (True, False, True, False)
    with path.open("rb") as a, local.open("rb") as b:
        for n in (10, 300, 1, 0):
            assert (a.read(n), a.tell()) == (b.read(n), b.tell())
        assert a.readline() == b.readline()
        assert a.seek(-7, io.SEEK_END) == b.seek(-7, io.SEEK_END)
        assert a.read() == b.read()


def test_an_empty_file(root: RemotePath) -> None:
    path = write(root / "empty", b"")
    with path.open("rb") as file:
        assert file.read() == path.read_bytes() == b""


def test_what_is_not_there_is_named(root: RemotePath) -> None:
    write(root / "there")
    with pytest.raises(FileNotFoundError) as e:
        (root / "absent").read_bytes()
    assert e.value.filename == f"{root}/absent"
    assert (root / "ther").sibling_like() == root / "there"
    assert (root / "x").sibling_like() is None
    assert (root / "no" / "folder").sibling_like() is None


def test_a_missing_bucket(s3: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, bucket or repository"):
        RemotePath("s3://other/a").read_bytes()
    with pytest.raises(UserError, match="no such bucket"):
        check_remote_replaceable(RemotePath("s3://other/a"), "meta.json", False)


def test_listing(root: RemotePath) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md"):
        write(root / name)
    assert [p.name for p in root.iterdir()] == ["a.txt", "b.txt", "sub"]
    assert root.files() == [root / name for name in ("a.txt", "b.txt", "sub/c.txt", "sub/d.md")]
    assert (root / "**/*.txt").glob() == [root / name for name in ("a.txt", "b.txt", "sub/c.txt")]
    assert (root / "*.md").glob() == []
    fsspec.filesystem(root.scheme, skip_instance_cache=True).pipe_file(f"{root}/new.txt", b"from elsewhere")
    assert root / "new.txt" in [*root.iterdir()]


def test_an_object_that_stands_for_a_folder_is_no_file(s3: str) -> None:
    """Consoles make them."""
    root = write(RemotePath(f"{s3}/console/a")).parent
    fsspec.filesystem("s3").call_s3("put_object", Bucket=s3.removeprefix("s3://"), Key="console/sub/", Body=b"")
    assert root.files() == [root / "a"]


def test_paths_are_in_the_order_of_local_ones() -> None:
    names = ["a-b/x", "a/x", "a", "a.b", "a/b/c", "B"]
    assert [p.url for p in sorted(RemotePath(f"s3://{name}") for name in names)] == [
        f"s3://{path}" for path in sorted(map(Path, names))
    ]


def test_every_fifth_request_may_fail(memory: RemotePath, failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(memory / "a")
    _, waits = failing(lambda n: OSError(errno.EBUSY, "slow down") if n % 5 == 0 else None)
    array = RemoteArray(path, np.dtype("u1"), len(CONTENT), BlockCache(Path("/tmp"), 1024, 128))
    assert array[0:5000].tobytes() == CONTENT[:5000]
    assert len(waits) > 5
    assert (
        capsys.readouterr().err.splitlines()[0]
        == "memory://bucket/a could not be read ([Errno 16] slow down); trying again"
    )


def test_a_file_that_comes_short_is_read_again(memory: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cut = write(memory / "a"), iter([1, 0])
    whole = fsspec.get_filesystem_class("memory").cat_file
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        fsspec.get_filesystem_class("memory"),
        "cat_file",
        lambda self, name, start, end: whole(self, name, start, end)[: end - start - next(cut)],
    )
    assert path.read_range(3, 9) == CONTENT[3:9]


def test_a_backend_that_takes_long_to_fail_is_not_asked_seven_times(
    memory: RemotePath, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 25))
    failing(lambda n: TimeoutError("no answer"))
    monkeypatch.setattr(remote.time, "monotonic", lambda: next(seconds))
    with pytest.raises(UserError, match=r"could not be read in 3 attempts \(no answer\); try again later"):
        (memory / "a").read_bytes()


def test_a_failure_that_lasts_ends_in_one_line(memory: RemotePath, failing: Any) -> None:
    calls, waits = failing(lambda n: TimeoutError("no answer"))
    with pytest.raises(UserError) as e:
        (memory / "a").read_bytes()
    assert str(e.value) == "memory://bucket/a could not be read in 7 attempts (no answer); try again later"
    assert calls.calls == 7
    assert len(waits) == 6
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError("Forbidden"), "memory://bucket/a could not be read: access was denied (Forbidden)"),
        (OSError(errno.EINVAL, "no range"), "memory://bucket/a could not be read ([Errno 22] no range)"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(memory: RemotePath, failing: Any, error: OSError, line: str) -> None:
    calls, waits = failing(lambda n: error)
    with pytest.raises(UserError) as e:
        (memory / "a").read_bytes()
    assert (str(e.value), calls.calls, waits) == (line, 1, [])


def test_a_bug_is_no_error_of_the_user(memory: RemotePath, failing: Any) -> None:
    failing(lambda n: TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        (memory / "a").read_bytes()


def test_a_scheme_that_is_unknown() -> None:
    with pytest.raises(UserError) as e:
        RemotePath("s4://b/a").read_bytes()
    assert str(e.value) == "s4://b/a could not be read: s4:// is unknown; did you mean s3://?"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"a package for gs:// is missing \(.*gcsfs.*\); pip install 'gpt-jax\[gcs\]'"):
        RemotePath("gs://b/a").read_bytes()


def test_credentials_that_are_missing(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"denied \(Unable to locate credentials\); set AWS_ACCESS_KEY_ID and"):
        RemotePath(f"{s3}/a").read_bytes()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_server_that_is_busy_every_fifth_time(tmp_path: Path) -> None:
    """The backend tries some requests again by itself; all of them come through."""
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "meta.json").write_text("{}")
    with s3_server(lambda n: n > 5 and n % 5 == 0) as bucket:
        folder = RemotePath(f"{bucket}/x")
        upload(tmp_path, folder, "meta.json")
        array = RemoteArray(folder / "a", np.dtype("u1"), len(CONTENT), BlockCache(tmp_path, 1 << 20, 1 << 10))
        assert array[:].tobytes() == CONTENT


@given(
    block=st.integers(1, 300),
    blocks=st.integers(1, 20),
    slices=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 900)), min_size=1, max_size=20),
)
def test_slices_equal_the_bytes_in_a_bounded_cache(block: int, blocks: int, slices: list[tuple[int, int]]) -> None:
    path = write(RemotePath("memory://sliced/a"))
    items = np.frombuffer(CONTENT, "<u2")
    cache = BlockCache(Path("/tmp"), block * blocks, block)
    array = RemoteArray(path, np.dtype("<u2"), len(items), cache)
    for start, count in slices:
        assert np.array_equal(array[start : start + count], items[start : start + count])
        assert os.fstat(cache._file.fileno()).st_size <= block * blocks


def test_threads_share_a_cache(memory: RemotePath, tmp_path: Path) -> None:
    paths = [write(memory / name, bytes(np.random.default_rng(i).bytes(20_000))) for i, name in enumerate("abc")]
    contents = [path.read_bytes() for path in paths]
    cache = BlockCache(tmp_path, 10 * 512, 512)
    arrays = [RemoteArray(path, np.dtype("u1"), 20_000, cache) for path in paths]

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            i, start = int(rng.integers(3)), int(rng.integers(20_000))
            assert arrays[i][start : start + 700].tobytes() == contents[i][start : start + 700]
            assert os.fstat(cache._file.fileno()).st_size <= 10 * 512

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


def test_a_block_is_fetched_once_while_it_is_kept(
    memory: RemotePath, failing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(memory / "a")
    array = RemoteArray(path, np.dtype("u1"), len(CONTENT), BlockCache(tmp_path, 2 * 1024, 1024))
    calls, _ = failing(lambda n: None)
    for start, fetched in ((0, 1), (5, 1), (1024, 2), (0, 2), (2048, 3), (0, 3), (1024, 4)):
        array[start : start + 10]
        assert calls.calls == 2 * fetched  # One for the bytes, one for the version.
        assert ("fetched again and again; set XDG_CACHE_HOME" in capsys.readouterr().err) == (start == 2048)


def test_a_block_that_threads_ask_for_is_fetched_once(tmp_path: Path) -> None:
    """Those that wait for it get what is fetched, or why it cannot be."""
    cache, started, ends = BlockCache(tmp_path, 2 * 16, 16), threading.Event(), threading.Event()
    answers: list[bytes | Exception] = [b"ab", UserError("no answer"), b"cd"]

    def fetch() -> bytes:
        answer = answers.pop(0)
        started.set()
        assert ends.wait(10)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with ThreadPoolExecutor(4) as pool:
        for key, expected in (("a", b"b"), ("c", None)):
            asked = [pool.submit(cache.read, key, slice(1, 2), fetch)]
            assert started.wait(10)
            asked += [pool.submit(cache.read, key, slice(1, 2), fetch) for _ in range(3)]
            time.sleep(0.1)
            ends.set()
            for future in asked:
                if expected:
                    assert future.result(10) == expected
                else:
                    with pytest.raises(UserError, match="no answer"):
                        future.result(10)
            started.clear()
            ends.clear()
    ends.set()
    assert cache.read("c", slice(1, 2), fetch) == b"d"  # It is asked for again.
    assert answers == []
    assert cache.read("a", slice(0, 2), fetch) == b"ab"


def test_a_fetch_blocks_no_other_reader(tmp_path: Path) -> None:
    cache, started, ends = BlockCache(tmp_path, 1024, 16), threading.Event(), threading.Event()

    def slow() -> bytes:
        started.set()
        assert ends.wait(10)
        return b"slow"

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.read, "a", slice(0, 4), slow)
        assert started.wait(10)
        assert cache.read("b", slice(0, 4), lambda: b"fast") == b"fast"
        ends.set()
        assert waiting.result() == b"slow"


def test_a_file_that_is_replaced_while_it_is_read(root: RemotePath, tmp_path: Path) -> None:
    path = write(root / "a")
    array = RemoteArray(path, np.dtype("u1"), len(CONTENT), BlockCache(tmp_path, 4096, 1024))
    assert array[0:10].tobytes() == CONTENT[:10]
    write(path, CONTENT[::-1])
    assert array[10:20].tobytes() == CONTENT[10:20]  # Of the block that is here.
    with pytest.raises(UserError, match="was replaced while it was read; start again"):
        array[2000:2010]


def test_a_disk_that_is_full(memory: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(memory / "a")
    array = RemoteArray(path, np.dtype("u1"), len(CONTENT), BlockCache(tmp_path, 4096, 1024))
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda file, content, offset: 10)
        for start in range(0, 8192, 1024):  # More often than the cache has places.
            with pytest.raises(UserError, match="cannot keep"):
                array[start : start + 10]
        with pytest.raises(UserError, match=r"cannot keep .* \(No space left on device\); make room, or set XDG"):
            array[0:10]
    assert array[:].tobytes() == CONTENT


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A finished folder."""
    folder = tmp_path / "local"
    folder.mkdir()
    for name in ("a.bin", "meta.json", "z.bin"):
        (folder / name).write_text(name)
    return folder


def test_a_folder_is_whole_when_it_has_its_marker(
    root: RemotePath, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for method in ("upload", "unlink"):
        real = getattr(RemotePath, method)

        def recorded(self: RemotePath, *args: Any, method: str = method, real: Any = real) -> None:
            done.append(f"{method} {self.name}")
            real(self, *args)

        monkeypatch.setattr(RemotePath, method, recorded)
    folder = root / "data"
    write(folder / "a-old.bin")
    write(folder / "meta.json")
    upload(local, folder, "meta.json")
    assert done == [
        *(f"upload {UNFINISHED}", "unlink meta.json", "unlink a-old.bin"),
        *("upload a.bin", "upload z.bin", "upload meta.json", f"unlink {UNFINISHED}"),
    ]
    assert {path.name: path.read_text() for path in folder.files()} == {p.name: p.read_text() for p in local.iterdir()}


def test_what_is_not_ours_is_not_replaced(root: RemotePath, local: Path) -> None:
    check_remote_replaceable(root / "new", "meta.json", force=False)
    assert not (root / "new" / UNFINISHED).exists()
    write(root / "foreign" / "a")
    with pytest.raises(UserError, match="exists and was not written by this command"):
        check_remote_replaceable(root / "foreign", "meta.json", force=True)
    upload(local, root / "ours", "meta.json")
    with pytest.raises(UserError, match="exists; --force replaces it"):
        check_remote_replaceable(root / "ours", "meta.json", force=False)
    check_remote_replaceable(root / "ours", "meta.json", force=True)
    assert not (root / "ours" / UNFINISHED).exists()
    (root / "ours" / "meta.json").unlink()
    write(root / "ours" / UNFINISHED)
    check_remote_replaceable(root / "ours", "meta.json", force=False)  # Left unfinished.


def test_a_block_that_fails_changes_nothing(root: RemotePath, local: Path) -> None:
    upload(local, root / "data", "meta.json")
    with pytest.raises(FileNotFoundError), whole_remote_folder(root / "data", "meta.json") as folder:
        (folder / "no" / "b.bin").write_text("b")
    assert [path.name for path in (root / "data").files()] == ["a.bin", "meta.json", "z.bin"]


@pytest.mark.parametrize("name", ["a.bin", "z.bin"])
def test_two_writers_are_noticed(memory: RemotePath, local: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = RemotePath.upload

    def disturbed(self: RemotePath, file: Path) -> None:
        real(self, file)
        if self.name == "z.bin":
            write(self.parent / name, b"other content")

    monkeypatch.setattr(RemotePath, "upload", disturbed)
    with pytest.raises(UserError, match=r"another process (is|may be) writing memory://bucket/data"):
        upload(local, memory / "data", "meta.json")
    assert not (memory / "data" / "meta.json").exists()
