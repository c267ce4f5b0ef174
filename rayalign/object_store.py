"""Object stores as pyarrow file systems of which every call is tried again, with pauses, where it fails for a while.

`storage.Store` works on them, Ray Train writes its checkpoints and notes through them, and what reads a data file from one gets
streams that go on where they were. Errors that will not change are raised at once.
"""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from rayalign.retries import retried

T = TypeVar("T")

BUCKETS = ("s3", "gs", "gcs")
"""Schemes whose URLs name a bucket first: one file system serves all that is in it."""

READ_AHEAD_BYTES = 2**20
"""What a stream that is read from its beginning asks for at a time."""

KEPT_IN_MEMORY_BYTES = 32 * 2**20
"""Of a file that is written; the rest waits on the local disk until it is complete."""

BLOCK_BYTES = 8 * 2**20


def file_system(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URL and the path in it. Raises pyarrow.ArrowInvalid for what is no URL of a file system, and as the
    calls of that file system do."""
    scheme, _, rest = location.partition("://")
    inner, sign, options = rest.partition("?")
    place, slash, key = inner.partition("/")
    bucket = place.rpartition("@")[2]
    if scheme in BUCKETS and bucket:
        base, path = f"{scheme}://{place}{sign}{options}", unquote(f"{bucket}{slash}{key}".rstrip("/"))
    else:
        base, path = location, _connected(location)[1]
    _connected(base)  # what is wrong with the URL is said here
    return pafs.PyFileSystem(RetriedFiles(base)), path


@functools.lru_cache(maxsize=16)
def _connected(base: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system, kept: connecting anew for each call would cost more than many a call."""
    place = base.partition("?")[0].rpartition("@")[2]  # without credentials
    found: tuple[pafs.FileSystem, str] = retried(lambda: pafs.FileSystem.from_uri(base), place)
    return found


class RetriedFiles(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """The calls of the file system behind a URL, each retried; pickles as the URL, so that no credentials of the environment
    travel."""

    def __init__(self, base: str) -> None:
        self._base = base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetriedFiles) and self._base == other._base

    def __hash__(self) -> int:
        return hash(self._base)

    @property
    def inner(self) -> pafs.FileSystem:
        return _connected(self._base)[0]

    def retried(self, work: Callable[[], T], path: str) -> T:
        """`retried`, at a path of this file system."""
        return retried(work, f"{self._base.partition('://')[0]}://{path}")

    def get_type_name(self) -> str:
        return str(self.inner.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self.retried(lambda: self.inner.get_file_info(paths), paths[0] if paths else "")
        return found

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self.retried(lambda: self.inner.get_file_info(selector), selector.base_dir)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self.retried(lambda: self.inner.create_dir(path, recursive=recursive), path)

    def delete_dir(self, path: str) -> None:
        self._delete(lambda: self.inner.delete_dir(path), path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._delete(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok), path)

    def delete_root_dir_contents(self) -> None:
        self._delete(lambda: self.inner.delete_dir_contents("", accept_root_dir=True), "")

    def delete_file(self, path: str) -> None:
        self._delete(lambda: self.inner.delete_file(path), path)

    def _delete(self, work: Callable[[], None], path: str) -> None:
        """Deletes; where an attempt whose answer was lost had done it already, the next one finds nothing, and that is fine."""
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            with contextlib.suppress(*((FileNotFoundError,) if attempts > 1 else ())):
                work()

        self.retried(attempt, path)

    def move(self, source: str, target: str) -> None:
        # Once: a second attempt can't tell a move that was done from one of a file that was never there.
        self.inner.move(source, target)

    def copy_file(self, source: str, target: str) -> None:
        self.retried(lambda: self.inner.copy_file(source, target), target)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(RetriedFile(self, path), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(io.BufferedReader(RetriedFile(self, path), READ_AHEAD_BYTES), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(RetriedUpload(self, path, metadata), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("object stores don't append")

    def upload(self, read: Callable[[], IO[bytes]], path: str, metadata: Any = None) -> None:
        """Writes a file with what `read` gives from its beginning, again as a whole where the store fails."""

        def attempt() -> None:
            with self.inner.open_output_stream(path, compression=None, metadata=metadata) as stream:
                content = read()
                while block := content.read(BLOCK_BYTES):
                    stream.write(block)

        self.retried(attempt, path)


class RetriedFile(io.RawIOBase):
    """A file of an object store, read at any place; each read is a request of its own, which is made again where it fails or
    ends too early."""

    def __init__(self, files: RetriedFiles, path: str) -> None:
        super().__init__()
        self._files, self._path = files, path
        self._file = files.retried(lambda: files.inner.open_input_file(path), path)
        self._size: int = files.retried(lambda: self._file.size(), path)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if not size:
            return b""
        content = self.read_at(size, self._position)
        self._position += size
        return content

    def read_at(self, size: int, start: int) -> bytes:
        """`size` bytes from `start` on, or those that are there; threads may ask side by side."""
        size = max(0, min(size, self._size - start))
        return self._files.retried(lambda: self._read_whole(size, start), self._path) if size else b""

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _read_whole(self, size: int, start: int) -> bytes:
        content = bytes(self._file.read_at(size, start))
        if len(content) != size:
            raise OSError(f"{len(content)} of {size} bytes came")
        return content


class RetriedUpload(io.RawIOBase):
    """A file that goes to an object store when it is closed: a failed upload can only be done again from its beginning."""

    def __init__(self, files: RetriedFiles, path: str, metadata: Any) -> None:
        super().__init__()
        self._files, self._path, self._metadata = files, path, metadata
        self._content: IO[bytes] = tempfile.SpooledTemporaryFile(KEPT_IN_MEMORY_BYTES)  # noqa: SIM115  # closed with this file
        self._is_whole = True

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self._is_whole = False
        written = self._content.write(block)
        self._is_whole = True
        return written

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._content:
            if self._is_whole:  # else the local disk is full, which the writer knows
                self._files.upload(self._from_start, self._path, self._metadata)

    def _from_start(self) -> IO[bytes]:
        self._content.seek(0)
        return self._content


def open_file(location: str) -> RetriedFile:
    """The file at a URL, to be read at any place; raises FileNotFoundError where there is none."""
    filesystem, path = file_system(location)
    return RetriedFile(filesystem.handler, path)


def upload(file: Path, location: str) -> None:
    """Copies a local file to a URL."""
    filesystem, path = file_system(location)
    with contextlib.ExitStack() as opened:

        def read() -> IO[bytes]:
            return opened.enter_context(file.open("rb"))

        filesystem.handler.upload(read, path)
