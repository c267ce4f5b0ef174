import errno
import io
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from rayalign import storage
from rayalign.storage import Store, is_url


@pytest.fixture(params=["path", "file URL"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.at(str(tmp_path) if request.param == "path" else f"file://{tmp_path}")


def names(stores: list[Store], folder: Store) -> list[str]:
    return [store.location.removeprefix(folder.location + "/") for store in stores]


def test_what_is_written_can_be_read(folder: Store) -> None:
    file = folder / "deep" / "er" / "file.bin"
    file.write_bytes(b"\x00\xff one")
    assert file.read_bytes() == b"\x00\xff one"
    file.write_bytes(b"two")
    assert file.read_bytes() == b"two"
    (folder / "value.json").write_json({"a": [1, None, "ü"]})
    assert (folder / "value.json").read_json() == {"a": [1, None, "ü"]}


def test_a_write_that_fails_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    """A full disk, as a limit on the size of a file shows it."""
    text = f"""
import resource, signal
from rayalign.storage import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Store({str(tmp_path / "file")!r})
file.write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    file.write_bytes(b"new" * 1000)
except OSError as error:
    print(error.errno)
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{errno.EFBIG}\n"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


def test_some_files_of_a_folder_are_copied_by_name(folder: Store, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(name.encode())
    folder.download(tmp_path / "copy", ["a", "c"])
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["a", "c"]


def test_compressed_content_is_read_as_it_is(folder: Store) -> None:
    file = folder / "data.gz"
    file.write_bytes(b"not really gzip")
    assert file.read_bytes() == b"not really gzip"


def test_a_failed_write_leaves_the_old_content(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "file"
    file.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        file.write_bytes(b"new")
    assert file.read_bytes() == b"old"


def test_a_write_puts_the_whole_file_in_place_at_once(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = os.replace

    def look_first(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).exists(), Path(source).parent == Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_first)
    (folder / "file").write_bytes(b"whole")
    assert seen == [(b"whole", False, True)]  # complete, under another name beside it
    assert names(folder.list(), folder) == ["file"]


def test_a_file_that_does_not_exist_says_so(folder: Store) -> None:
    assert not (folder / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").read_bytes()


def test_a_folder_lists_what_is_in_it_by_name(folder: Store) -> None:
    for name in ("b", "a", "c/d", "c/e/f"):
        (folder / name).write_bytes(b"")
    assert names(folder.list(), folder) == ["a", "b", "c"]
    assert names(folder.list(recursive=True), folder) == ["a", "b", "c", "c/d", "c/e", "c/e/f"]
    assert (folder / "c").is_dir()
    assert not (folder / "a").is_dir()
    assert (folder / "nothing").list() == []


def test_deleting_takes_a_file_or_a_whole_folder_and_nothing_else(folder: Store) -> None:
    for name in ("keep", "file", "folder/a", "folder/b/c"):
        (folder / name).write_bytes(b"")
    (folder / "file").delete()
    (folder / "folder").delete()
    (folder / "nothing").delete()
    assert names(folder.list(recursive=True), folder) == ["keep"]


def test_a_folder_goes_up_and_comes_down_with_everything_in_it(folder: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "inner" / "two").write_bytes(b"2")
    target.mkdir()
    (folder / "remote").upload(source)
    (folder / "remote").download(target)
    assert (target / "one").read_bytes() == b"1"
    assert (target / "inner" / "two").read_bytes() == b"2"


def test_making_a_folder_twice_is_fine(folder: Store) -> None:
    for _ in range(2):
        (folder / "a" / "b").make_dir()
    assert (folder / "a" / "b").is_dir()


def test_names_parents_and_children() -> None:
    store = Store.at("s3://bucket/run/")
    assert store.location == "s3://bucket/run"
    assert (store / "model").location == "s3://bucket/run/model"
    assert (store.name, store.parent.location) == ("run", "s3://bucket")
    assert store.local_path is None
    assert is_url("gs://bucket")
    assert not is_url("/a/b")


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.at("output/run").location == str(tmp_path / "output" / "run")
    assert Store.at("~/run").location == str(tmp_path / "home" / "run")
    assert Store.at("file:///data/x").local_path == Path("/data/x")


def test_a_store_pickles_by_its_location(folder: Store) -> None:
    assert pickle.loads(pickle.dumps(folder)) == folder


@pytest.mark.parametrize("name", ["with space", "50%", "a+b", "ü", "a#b"])
def test_odd_names_work(folder: Store, name: str) -> None:
    (folder / name / "file").write_bytes(b"x")
    assert (folder / name / "file").read_bytes() == b"x"
    assert names(folder.list(), folder) == [name]


class Flaky(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """A local disk below /flaky, behind calls that each fail `failures` times before they work."""

    def __init__(self, root: Path, *, failures: int, error: OSError) -> None:
        self._root, self._failures, self._error = root, failures, error
        self._local = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.calls: Counter[tuple[str, str]] = Counter()

    def fails(self, failures: int) -> None:
        self._failures = failures
        self.calls.clear()

    def fail_first(self, call: str, path: str) -> None:
        self.calls[call, path] += 1
        if self.calls[call, path] <= self._failures:
            raise self._error

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self.fail_first("info", paths[0])
        return [
            pafs.FileInfo(path, found.type, size=found.size) for path in paths for found in self._local.get_file_info([path])
        ]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        self.fail_first("list", selector.base_dir)
        found: list[pafs.FileInfo] = self._local.get_file_info(selector)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self.fail_first("create_dir", path)
        self._local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.fail_first("delete_dir", path)
        self._local.delete_dir(path)

    def delete_file(self, path: str) -> None:
        self.fail_first("delete_file", path)
        self._local.delete_file(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.fail_first("open", path)
        return pa.PythonFile(FlakyFile(self._root / path, self), mode="r")

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        self.fail_first("write", path)
        return self._local.open_output_stream(path)

    open_append_stream = delete_dir_contents = delete_root_dir_contents = move = copy_file = None


class FlakyFile(io.BytesIO):
    """Its first read at each place fails."""

    def __init__(self, path: Path, system: Flaky) -> None:
        super().__init__(path.read_bytes())
        self._path, self._system = path, system

    def read(self, size: int | None = -1) -> bytes:
        self._system.fail_first(f"read at {self.tell()}", str(self._path))
        return super().read(size)


RESET = OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Recv failure")


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Store, Flaky]]:
    """Makes a store on a file system whose calls fail so many times with an error."""
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 1e-4)

    def make(failures: int, error: OSError = RESET) -> tuple[Store, Flaky]:
        (tmp_path / "remote").mkdir(exist_ok=True)
        system = Flaky(tmp_path / "remote", failures=failures, error=error)
        files = pafs.PyFileSystem(system)
        local = Store.resolve
        monkeypatch.setattr(
            Store,
            "resolve",
            lambda store: (files, store.location.removeprefix("flaky://")) if is_url(store.location) else local(store),
        )
        return Store("flaky://bucket"), system

    return make


def test_what_an_object_store_fails_at_is_tried_again(flaky: Callable[..., tuple[Store, Flaky]], tmp_path: Path) -> None:
    store, system = flaky(1)
    store.make_dir()
    (store / "file").write_bytes(b"content")
    assert (store / "file").read_bytes() == b"content"
    assert (store / "file").exists()
    assert store.is_dir()
    assert [file.name for file in store.list()] == ["file"]
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "one").write_bytes(b"1" * 10_000)
    (store / "folder").upload(tmp_path / "up")
    (tmp_path / "down").mkdir()
    (store / "folder").download(tmp_path / "down")
    assert (tmp_path / "down" / "one").read_bytes() == b"1" * 10_000
    (store / "file").delete()
    (store / "folder").delete()
    assert store.list() == []
    tried = {call.split(" at ")[0] for call, _ in system.calls}
    assert tried == {"create_dir", "write", "open", "read", "info", "list", "delete_file", "delete_dir"}


def test_five_failures_in_a_row_are_borne(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, system = flaky(storage.ATTEMPTS - 1)
    store.make_dir()
    (store / "file").write_bytes(b"content")
    assert set(system.calls.values()) == {storage.ATTEMPTS}


def test_single_reads_of_an_arrow_file_are_tried_again(flaky: Callable[..., tuple[Store, Flaky]], tmp_path: Path) -> None:
    batches = [pa.record_batch({"a": list(range(i, i + 1000))}) for i in range(5)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    store, system = flaky(0)
    store.make_dir()
    (store / "shard").write_bytes(sink.getvalue().to_pybytes())
    file = (store / "shard").open_arrow()
    system.fails(1)
    for i in (3, 0, 4, 3):
        assert file.get_batch(i) == batches[i]
    assert max(system.calls.values()) > 1


def test_an_object_store_that_goes_on_failing_is_told_with_its_own_words(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, system = flaky(1000)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        (store / "file").write_bytes(b"content")
    assert system.calls == {("write", "bucket/file"): storage.ATTEMPTS}


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("Path does not exist 'bucket/file'"),
        PermissionError("no"),
        OSError("When reading: AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist"),
        OSError("google::cloud::Status: could not create a OAuth2 access token: no credentials"),
        OSError("Not a regular file: 'bucket'"),
    ],
)
def test_what_will_not_change_is_not_asked_again(flaky: Callable[..., tuple[Store, Flaky]], error: OSError) -> None:
    store, system = flaky(1, error)
    with pytest.raises(type(error)) as caught:
        (store / "file").read_bytes()
    assert str(caught.value) == str(error)
    assert system.calls == {("open", "bucket/file"): 1}


def test_a_disk_is_not_asked_again(tmp_path: Path) -> None:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Store(str(tmp_path)).retried(fail)
    assert len(tries) == 1


def test_waiting_draws_no_number_of_the_run(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, _ = flaky(2)
    before = random.getstate()
    store.make_dir()
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is no JSON"),
        (b'{"a": ', "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it holds no JSON object."),
        (b"1", "it holds no JSON object."),
    ],
)
def test_a_damaged_json_file_is_told_by_its_name(folder: Store, content: bytes, problem: str) -> None:
    (folder / "note.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        (folder / "note.json").read_json_object()
    assert str(caught.value).startswith(f"{folder.location}/note.json is damaged: {problem}")
