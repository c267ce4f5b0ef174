"""Files on local disks and object stores under one interface: every path of a run may be a folder or an s3:// gs:// file://
URL."""

import json
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs


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

    def info(self) -> pafs.FileInfo:
        filesystem, path = self.resolve()
        return filesystem.get_file_info(path)

    def exists(self) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self.info().type == pafs.FileType.Directory)

    def list(self, *, recursive: bool = False) -> list["Store"]:
        """The files and folders inside, sorted by name; empty where the folder does not exist."""
        filesystem, path = self.resolve()
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
        inner = sorted(info.path.removeprefix(path).lstrip("/") for info in infos)
        return [self / name for name in inner if name]

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError where there is none."""
        filesystem, path = self.resolve()
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def open_arrow(self) -> Any:
        """An Arrow file, of which single record batches can be read: mapped into memory, or by ranges from an object store."""
        if self.local_path is not None:
            return pa.ipc.open_file(pa.memory_map(str(self.local_path)))
        filesystem, path = self.resolve()
        return pa.ipc.open_file(filesystem.open_input_file(path))

    def write_bytes(self, content: bytes) -> None:
        """Writes a file whole: readers see the old content or the new, never a part."""
        filesystem, path = self.resolve()
        local = self.local_path
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f".{local.name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            os.replace(partial, local)
            return
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

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
        match self.info().type:
            case pafs.FileType.Directory:
                filesystem.delete_dir(path)
            case pafs.FileType.File:
                filesystem.delete_file(path)

    def upload(self, folder: Path) -> None:
        """Copies a local folder's files into this one."""
        filesystem, path = self.resolve()
        self.make_dir()
        pafs.copy_files(str(folder), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)

    def download(self, folder: Path) -> None:
        """Copies this folder's files into a local one."""
        filesystem, path = self.resolve()
        pafs.copy_files(path, str(folder), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
