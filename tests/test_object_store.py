import errno
import io
import pickle
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from rayalign import object_store, retries
from rayalign.retries import StorageFailed
from rayalign.sources.rows import read_rows
from rayalign.storage import Store


class Flaky(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """A local disk below /flaky, behind calls that each fail `failures` times before they work."""

    def __init__(self, root: Path, *, failures: int, error: OSError) -> None:
        self.root, self._failures, self._error = root, failures, error
        self._local = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.calls: Counter[tuple[str, str]] = Counter()
        self.cut_reads = 0
        self.loses_answers = False

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
        self._lose_answer()

    def delete_file(self, path: str) -> None:
        self.fail_first("delete_file", path)
        self._local.delete_file(path)
        self._lose_answer()

    def _lose_answer(self) -> None:
        if self.loses_answers:
            raise self._error

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.fail_first("open", path)
        return pa.PythonFile(FlakyFile(self.root / path, self), mode="r")

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
        content = super().read(size)
        if self._system.cut_reads:
            self._system.cut_reads -= 1
            return content[: len(content) // 2]
        return content


RESET = OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Recv failure")


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Store, Flaky]]:
    """Makes a store on a file system whose calls fail so many times with an error."""
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 1e-4)

    def make(failures: int, error: OSError = RESET) -> tuple[Store, Flaky]:
        (tmp_path / "remote").mkdir(exist_ok=True)
        system = Flaky(tmp_path / "remote", failures=failures, error=error)
        files = pafs.PyFileSystem(system)
        monkeypatch.setattr(object_store, "_connected", lambda base: (files, ""))
        return Store("s3://bucket"), system

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
    store, system = flaky(retries.ATTEMPTS - 1)
    store.make_dir()
    (store / "file").write_bytes(b"content")
    assert set(system.calls.values()) == {retries.ATTEMPTS}


def test_a_stream_goes_on_where_it_broke(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    content = random.Random(0).randbytes(3_000_000)
    store, system = flaky(0)
    store.make_dir()
    (store / "file").write_bytes(content)
    system.fails(1)
    filesystem, path = (store / "file").resolve()
    with filesystem.open_input_stream(path) as stream:
        parts = []
        while part := stream.read(70_000):
            parts.append(part)
    assert b"".join(parts) == content
    reads = [call for call, _ in system.calls if call.startswith("read at")]
    assert len(reads) == 3  # a block of a mebibyte at a time
    system.fails(1)
    with (store / "file").open_file() as file:
        for start, size in ((2_900_000, 200_000), (5, 7), (0, 3_000_000), (3_000_000, 1)):
            assert file.read_at(size, start) == content[start : start + size]
    assert system.calls["read at 2900000", str(system.root / "bucket" / "file")] == 2


def test_threads_read_one_file_at_many_places_past_failures(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    content = random.Random(0).randbytes(100_000)
    store, system = flaky(0)
    store.make_dir()
    (store / "file").write_bytes(content)
    system.fails(1)
    with (store / "file").open_file() as file, ThreadPoolExecutor(16) as threads:
        parts = list(threads.map(lambda start: file.read_at(100, start), range(0, 100_000, 100)))
    assert b"".join(parts) == content


def test_a_body_that_ends_in_the_middle_is_read_again(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, system = flaky(0)
    store.make_dir()
    (store / "file").write_bytes(b"0123456789")
    system.cut_reads = 2
    assert (store / "file").read_bytes() == b"0123456789"
    assert system.cut_reads == 0


def test_parquet_and_arrow_files_are_read_past_failures(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    table = pa.table({"a": list(range(5000))})
    store, system = flaky(0)
    store.make_dir()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=500)
    (store / "rows.parquet").write_bytes(sink.getvalue().to_pybytes())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    (store / "rows.arrow").write_bytes(sink.getvalue().to_pybytes())
    (store / "rows.jsonl").write_bytes(b"".join(b'{"a": %d}\n' % i for i in range(5000)))
    for name in ("rows.parquet", "rows.arrow", "rows.jsonl"):
        system.fails(2)
        assert [row for _, row in read_rows((store / name).location)] == table.to_pylist()
        assert max(system.calls.values()) >= 3
        system.fails(1000)
        with pytest.raises(StorageFailed):  # and not: this is no parquet file
            list(read_rows((store / name).location))


def test_what_was_deleted_by_an_attempt_without_an_answer_is_gone(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, system = flaky(0)
    store.make_dir()
    (store / "folder").make_dir()
    for name in ("file", "folder/file"):
        (store / name).write_bytes(b"content")
    system.loses_answers = True
    (store / "file").delete()
    (store / "folder").delete()
    assert store.list() == []
    with pytest.raises(FileNotFoundError):
        store.resolve()[0].delete_file("bucket/file")


def test_nothing_is_written_of_a_file_that_the_local_disk_could_not_hold(
    flaky: Callable[..., tuple[Store, Flaky]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = flaky(0)
    store.make_dir()

    def fail(file: object, block: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        (store / "file").write_bytes(b"content")
    assert store.list() == []


def test_an_object_store_that_goes_on_failing_ends_in_a_sentence(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, system = flaky(1000)
    with pytest.raises(StorageFailed) as caught:
        (store / "file").write_bytes(b"content")
    assert str(caught.value) == (
        "s3://bucket/file: the storage failed 6 times in 0 s, at last with: When reading: AWS Error NETWORK_CONNECTION during "
        "GetObject operation: curlCode: 56, Recv failure."
    )
    assert system.calls == {("write", "bucket/file"): retries.ATTEMPTS}
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.errno) == (StorageFailed, str(caught.value), errno.EIO)


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body."),
        OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."),
        OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream"),
        OSError("AWS Error REQUEST_TIMEOUT during UploadPart operation"),
        OSError("AWS Error UNKNOWN (HTTP status 429) during GetObject operation"),
        OSError("AWS Error SERVICE_UNAVAILABLE during ListObjectsV2 operation"),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError(110, "timed out"),
    ],
)
def test_what_may_pass_is_asked_again(flaky: Callable[..., tuple[Store, Flaky]], error: OSError) -> None:
    store, system = flaky(0, error)
    store.make_dir()
    (store / "file").write_bytes(b"content")
    system.fails(1)
    assert (store / "file").read_bytes() == b"content"


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
    assert isinstance(Store(str(tmp_path)).resolve()[0], pafs.LocalFileSystem)
    assert isinstance(Store(f"file://{tmp_path}").resolve()[0], pafs.LocalFileSystem)


def test_the_file_system_pickles_without_credentials(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, _ = flaky(0)
    store.make_dir()
    filesystem, _ = store.resolve()
    packed = pickle.dumps(filesystem)
    assert b"s3://bucket" in packed
    assert len(packed) < 200
    copy = pickle.loads(packed)
    assert copy == filesystem
    assert copy.get_file_info("bucket").type == pafs.FileType.Directory


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://bucket/a%20b/c", "bucket/a b/c"),
        ("s3://bucket/a b", "bucket/a b"),
        ("s3://bucket/50%", "bucket/50%"),
        ("s3://bucket/", "bucket"),
        ("s3://bucket/a/?region=x", "bucket/a"),
        ("s3://key:secret@bucket/a@b", "bucket/a@b"),
        ("s3://bucket/a@b/c", "bucket/a@b/c"),
    ],
)
def test_the_path_of_a_url_is_its_bucket_and_key(monkeypatch: pytest.MonkeyPatch, url: str, path: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # else the region is asked for
    assert object_store.file_system(url)[1] == path


@pytest.mark.parametrize("url", ["http://host/file", "foo://bucket", "s3:///key"])
def test_what_is_no_url_of_a_file_system_is_told_at_once(url: str) -> None:
    with pytest.raises(pa.ArrowInvalid):
        object_store.file_system(url)


def test_waiting_draws_no_number_of_the_run(flaky: Callable[..., tuple[Store, Flaky]]) -> None:
    store, _ = flaky(2)
    before = random.getstate()
    store.make_dir()
    assert random.getstate() == before
