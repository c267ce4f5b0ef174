"""Files of the cache whose content is checked when it is read, so that no run trains on what a disk, a copy or another program
has changed. What the checksums are compared with stands in `store`'s index and in the heads of `reference_store`'s files.

A run that meets damage leaves a note beside the file and ends; the next start finds the note and makes the file anew. CRC-32
finds every flipped bit and takes a fraction of the time of reading; it is no protection against forgery.
"""

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import pyarrow as pa

from rayalign.storage import Store

T = TypeVar("T")

NOTES = "damaged"
"""The folder, beside files of the cache, of notes named like those of them that a run found damaged."""

READS = 16
"""What is read from an object store at a time."""

OPEN_FILES, OPEN_OBJECTS = 64, 1024
"""Files that are kept open: on a disk, where each takes a descriptor, and of an object store, where it only saves a request."""

WRONG = "is damaged: its content does not have the checksum that it was written with"


class DamagedFile(ValueError):
    """A file of the cache is damaged or missing; says which, and what makes it anew."""


class Place(NamedTuple):
    """Where a record batch stands in a file, in bytes, and the CRC-32 of these bytes."""

    start: int
    size: int
    checksum: int


def pack(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> tuple[bytes, list[Place]]:
    """An Arrow file of record batches, and where each of them stands in it."""
    sink = pa.BufferOutputStream()
    spans = []
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            spans.append((sink.tell() - pa.ipc.get_record_batch_size(batch), sink.tell()))
    content = sink.getvalue().to_pybytes()
    return content, [Place(start, end - start, zlib.crc32(memoryview(content)[start:end])) for start, end in spans]


class CheckedFile:
    """A file of the cache that is read in pieces, each compared with its checksum; it is opened with the first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: pa.NativeFile | None = None

    def read_batch(self, place: Place, schema: pa.Schema) -> pa.RecordBatch:
        """The record batch at a place; raises DamagedFile."""
        return pa.ipc.read_record_batch(pa.py_buffer(self.read(place)), schema)

    def read(self, place: Place, *, checksum_before: int = 0) -> bytes:
        """The bytes at a place, whose checksum goes on from `checksum_before`. What seems wrong is read once more, from the
        file opened anew. Raises DamagedFile, and leaves a note for the next start."""
        what = ""
        for _ in range(2):
            try:
                file = self._file or self._store.open_file()
                content = bytes(file.read_at(place.size, place.start))
            except FileNotFoundError:
                what = "is missing"
                continue
            if len(content) == place.size and zlib.crc32(content, checksum_before) == place.checksum:
                self._file = file
                return content
            what = WRONG if len(content) == place.size else "is damaged: it ends too early"
            self._file = None
        raise noted(self._store, what)


def noted(file: Store, what: str) -> DamagedFile:
    """The error that ends a run at a damaged file of the cache, which is marked for the next start."""
    remedy = "The same command makes it anew."
    try:
        (file.parent / NOTES / file.name).write_bytes(what.encode())
    except OSError as error:
        remedy = f"Delete it, then the same command makes it anew (it can't be marked as damaged: {error})."
    return DamagedFile(f"{file.location} {what}. {remedy}")


def names_noted(folder: Store) -> set[str]:
    """The files of a folder that some run found damaged and that were not made anew yet."""
    return {name for name in (folder / NOTES).sizes() if name.endswith(".arrow") and not name.startswith(".")}


def forget(folder: Store, names: Iterable[str]) -> None:
    """Takes the notes about files back that were made anew."""
    for name in names_noted(folder).intersection(names):
        (folder / NOTES / name).delete()


def require_undamaged(folder: Store) -> None:
    """Raises DamagedFile where a run found a file of this folder damaged: it has to be made anew before anything is read."""
    for name in sorted(names_noted(folder)):
        what = (folder / NOTES / name).read_bytes().decode(errors="replace")
        raise DamagedFile(f"{(folder / name).location} {what}. The same command makes it anew.")


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_whole(file: Store, sha256: str) -> bytes:
    """A small file's content; raises DamagedFile where it is missing, or hasn't the hash that it was written with."""
    for _ in range(2):
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise DamagedFile(f"{file.location} is missing. The same command makes it anew.") from None
        if sha256_of(content) == sha256:
            return content
    raise DamagedFile(f"{file.location} {WRONG}. The same command makes it anew.")


def keep_open(open_file: Callable[[int], T], folder: Store) -> Callable[[int], T]:
    """The same function of a file's number in the folder, which keeps what it opened last."""
    return functools.lru_cache(OPEN_FILES if folder.local_path is not None else OPEN_OBJECTS)(open_file)


def side_by_side(reads: Sequence[Callable[[], T]], folder: Store) -> list[T]:
    """What the reads give, in their order; several at a time where each waits for an object store."""
    if folder.local_path is not None or len(reads) < 2:
        return [read() for read in reads]
    with ThreadPoolExecutor(min(READS, len(reads))) as threads:
        return list(threads.map(lambda read: read(), reads))
