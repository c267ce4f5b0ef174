"""Files on local disks and object stores under one interface: every path of a run may be a folder or an s3:// gs:// file://
URL. What an object store fails at is tried again (`object_store`)."""

import contextlib
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from rayalign.object_store import BLOCK_BYTES, RetriedFile, file_system, open_file, upload

COPIES = 8
"""Files of a folder that are copied at a time."""


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
        place, options = self._parts
        return Store(f"{place}/{name}{options}")

    @property
    def name(self) -> str:
        return posixpath.basename(self._parts[0])

    @property
    def parent(self) -> "Store":
        """The folder that it is in; of a bucket, or a first folder by file://, itself."""
        place, options = self._parts
        folder = posixpath.dirname(place)
        return self if is_url(place) and not is_url(folder) else Store(f"{folder}{options}")

    @property
    def _parts(self) -> tuple[str, str]:
        """The place, and a URL's options, such as ?region=eu-west-1, which are those of all that is in it."""
        place, mark, options = self.location.partition("?") if is_url(self.location) else (self.location, "", "")
        return place.rstrip("/"), mark + options

    @property
    def local_path(self) -> Path | None:
        """The path on a local (or mounted) file system; None on an object store."""
        if self.location.startswith("file://"):
            return Path(self.location.removeprefix("file://"))
        return None if is_url(self.location) else Path(self.location)

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system and the path in it; an object store's tries again what fails."""
        local = self.local_path
        return file_system(self.location) if local is None else (pafs.LocalFileSystem(), str(local))

    def info(self) -> pafs.FileInfo:
        filesystem, path = self.resolve()
        return filesystem.get_file_info(path)

    def exists(self) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self.info().type == pafs.FileType.Directory)

    def list(self, *, recursive: bool = False) -> list["Store"]:
        """The files and folders inside, sorted by name; empty where the folder does not exist."""
        names = [name for name, _ in self._inside(allow_not_found=True, recursive=recursive)]
        return [self / name for name in names if name]

    def sizes(self) -> dict[str, int]:
        """The names and sizes in bytes of the files right inside; empty where the folder does not exist."""
        inside = self._inside(allow_not_found=True, recursive=False)
        return {name: int(info.size) for name, info in inside if info.type == pafs.FileType.File}

    def _inside(self, *, allow_not_found: bool, recursive: bool) -> Sequence[tuple[str, pafs.FileInfo]]:
        filesystem, path = self.resolve()
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=allow_not_found, recursive=recursive))
        return sorted(((info.path.removeprefix(path).lstrip("/"), info) for info in infos), key=lambda entry: entry[0])

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError where there is none."""
        with self.open_file() as file:
            return bytes(file.read())

    def open_file(self) -> "pa.NativeFile | RetriedFile":
        """The file, to be read at any place by `read_at(size, start)`; raises FileNotFoundError where there is none."""
        local = self.local_path
        return open_file(self.location) if local is None else pafs.LocalFileSystem().open_input_file(str(local))

    def write_bytes(self, content: bytes) -> None:
        """Writes a file whole: readers see the old content or the new, never a part."""
        if self.local_path is not None:
            with self.writing() as file:
                file.write(content)
            return
        filesystem, path = self.resolve()
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """A file to write bit by bit. It is there, whole, where the block ends without an error."""
        local = self.local_path
        if local is None:
            with tempfile.NamedTemporaryFile() as whole:
                yield whole
                whole.flush()
                upload(Path(whole.name), self.location)
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}.partial")  # of no other process of any node
        try:
            with partial.open("wb") as file:
                yield file
            os.replace(partial, local)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

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
        filesystem, path = self.resolve()
        filesystem.create_dir(path, recursive=True)

    def delete(self) -> None:
        """Deletes a file or a whole folder; nothing happens where there is none."""
        filesystem, path = self.resolve()
        match filesystem.get_file_info(path).type:
            case pafs.FileType.Directory:
                filesystem.delete_dir(path)
            case pafs.FileType.File:
                filesystem.delete_file(path)

    def upload(self, folder: Path) -> None:
        """Copies a local folder's files into this one."""
        self.make_dir()
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]

        def copy(name: str) -> None:
            target = self / name
            if target.local_path is None:
                upload(folder / name, target.location)
            else:
                _copy(Store(str(folder / name)), target.local_path)

        _side_by_side(copy, names)

    def download(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Copies this folder's files, or those of some `names`, into a local one; raises FileNotFoundError where there is
        none."""
        if names is None:
            inside = self._inside(allow_not_found=False, recursive=True)
            names = [name for name, info in inside if info.type == pafs.FileType.File]
        _side_by_side(lambda name: _copy(self / name, folder / name), names)


def _copy(source: Store, target: Path) -> None:
    """Copies a file to the local disk. It is there, whole, at the end."""
    with source.open_file() as file, Store(str(target)).writing() as copy:
        while block := file.read(BLOCK_BYTES):
            copy.write(block)


def _side_by_side(copy: Callable[[str], None], names: Sequence[str]) -> None:
    with ThreadPoolExecutor(COPIES) as threads:
        for _ in threads.map(copy, names):
            pass
