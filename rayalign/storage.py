"""Files on local disks and object stores under one interface: every path of a run may be a folder or an s3:// gs:// file://
URL. What an object store fails at is tried again."""

import json
import logging
import os
import posixpath
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

T = TypeVar("T")

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
"""The wait after the first failure; each is twice the one before, 16 s in all, less a random share of each."""

COPIES = 8
"""Files of a folder that are copied at a time."""

LASTING_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
LASTING_WORDS = (
    *("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH"),
    *("Not a regular file", "does not exist", "credentials"),
)
"""In the errors of object stores that answer the same however often they are asked."""


def is_url(location: str) -> bool:
    """Whether a location names a file system by scheme (s3://...) and is not a plain path."""
    return "://" in location


@dataclass(frozen=True)
class Store:
    """A folder or file on some file system; pickles by its location, so that any process of a cluster can open it.

    `location` is an absolute path or a URL.
    """

    location: str

    @classmethod
    def at(cls, location: str) -> "Store":
        """The store at a path (made absolute) or URL."""
        if is_url(location):
            return cls(location.rstrip("/"))
        return cls(os.path.abspath(os.path.expanduser(location)))

    def __truediv__(self, name: str) -> "Store":
        return Store(f"{self.location.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return posixpath.basename(self.location.rstrip("/"))

    @property
    def parent(self) -> "Store":
        return Store(posixpath.dirname(self.location.rstrip("/")))

    @property
    def local_path(self) -> Path | None:
        """The path on a local (or mounted) file system; None on an object store."""
        if self.location.startswith("file://"):
            return Path(self.location.removeprefix("file://"))
        return None if is_url(self.location) else Path(self.location)

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system and the path in it."""
        local = self.local_path
        if local is not None:
            return pafs.LocalFileSystem(), str(local)
        filesystem, path = pafs.FileSystem.from_uri(self.location)
        return filesystem, path

    def retried(self, work: Callable[[], T]) -> T:
        """The result of some reading or writing here, which is tried again where an object store fails; a disk's errors last.
        The work is done from its beginning each time."""
        if self.local_path is not None:
            return work()
        wait, lots = FIRST_WAIT_SECONDS, random.SystemRandom()  # no draw from the run's own generators
        for attempt in range(1, ATTEMPTS):
            try:
                return work()
            except OSError as error:
                if isinstance(error, LASTING_ERRORS) or any(words in str(error) for words in LASTING_WORDS):
                    raise
                logger.info("Storage: attempt %d of %d at %s failed: %s", attempt, ATTEMPTS, self.location, error)
                time.sleep(wait * lots.uniform(0.5, 1))
                wait *= 2
        return work()

    def info(self) -> pafs.FileInfo:
        def look() -> pafs.FileInfo:
            filesystem, path = self.resolve()
            return filesystem.get_file_info(path)

        return self.retried(look)

    def exists(self) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self.info().type == pafs.FileType.Directory)

    def list(self, *, recursive: bool = False) -> list["Store"]:
        """The files and folders inside, sorted by name; empty where the folder does not exist."""

        def look() -> list[str]:
            filesystem, path = self.resolve()
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
            return sorted(info.path.removeprefix(path).lstrip("/") for info in infos)

        return [self / name for name in self.retried(look) if name]

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError where there is none."""

        def read() -> bytes:
            filesystem, path = self.resolve()
            with filesystem.open_input_stream(path, compression=None) as stream:
                return bytes(stream.read())

        return self.retried(read)

    def open_arrow(self) -> "ArrowFile":
        """An Arrow file, of which single record batches can be read: mapped into memory, or by ranges from an object store."""
        return ArrowFile(self)

    def write_bytes(self, content: bytes) -> None:
        """Writes a file whole: readers see the old content or the new, never a part."""
        local = self.local_path
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f".{local.name}.{os.getpid()}.partial")
            try:
                partial.write_bytes(content)
                os.replace(partial, local)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            return

        def write() -> None:
            filesystem, path = self.resolve()
            with filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(content)

        self.retried(write)

    def read_json(self) -> Any:
        """What the file holds; raises ValueError that names it where that is no JSON."""
        try:
            return json.loads(self.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.location} is damaged: it is no JSON ({error}).") from None

    def read_json_object(self) -> dict[str, Any]:
        """What the file holds; raises ValueError that names it where that is no JSON object."""
        value = self.read_json()
        if not isinstance(value, dict):
            raise ValueError(f"{self.location} is damaged: it holds no JSON object.")
        return value

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=2) + "\n").encode())

    def make_dir(self) -> None:
        def make() -> None:
            filesystem, path = self.resolve()
            filesystem.create_dir(path, recursive=True)

        self.retried(make)

    def delete(self) -> None:
        """Deletes a file or a whole folder; nothing happens where there is none."""

        def delete() -> None:
            filesystem, path = self.resolve()
            match filesystem.get_file_info(path).type:
                case pafs.FileType.Directory:
                    filesystem.delete_dir(path)
                case pafs.FileType.File:
                    filesystem.delete_file(path)

        self.retried(delete)

    def upload(self, folder: Path) -> None:
        """Copies a local folder's files into this one."""
        self.make_dir()
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        _side_by_side(lambda name: Store(str(folder / name))._copy_to(self / name), names)

    def download(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Copies this folder's files, or those of some `names`, into a local one."""

        def look() -> list[str]:
            filesystem, path = self.resolve()
            infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            return [info.path.removeprefix(path).lstrip("/") for info in infos if info.type == pafs.FileType.File]

        found = names if names is not None else self.retried(look)
        _side_by_side(lambda name: (self / name)._copy_to(Store(str(folder / name))), found)

    def _copy_to(self, target: "Store") -> None:
        """Copies this file; what fails is one file's copy, and not that of the whole folder."""
        remote = self if target.local_path is not None else target
        if target.local_path is not None:
            target.local_path.parent.mkdir(parents=True, exist_ok=True)

        def copy() -> None:
            (source_system, source), (target_system, path) = self.resolve(), target.resolve()
            pafs.copy_files(source, path, source_filesystem=source_system, destination_filesystem=target_system)

        remote.retried(copy)


def _side_by_side(copy: Callable[[str], None], names: Sequence[str]) -> None:
    with ThreadPoolExecutor(COPIES) as threads:
        for _ in threads.map(copy, names):
            pass


class ArrowFile:
    """An Arrow file whose record batches are read one by one, each again where an object store fails at it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader: Any = store.retried(self._open)

    def get_batch(self, index: int) -> pa.RecordBatch:
        """The record batch with this number."""
        return self._store.retried(lambda: self._reader.get_batch(index))

    def _open(self) -> Any:
        if self._store.local_path is not None:
            return pa.ipc.open_file(pa.memory_map(str(self._store.local_path)))
        filesystem, path = self._store.resolve()
        return pa.ipc.open_file(filesystem.open_input_file(path))
