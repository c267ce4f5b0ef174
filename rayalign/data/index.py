"""The index of encoded records: a line for each pair, in the order of the sources. `store`'s manifest has its hash.

Written bit by bit while tasks report, so that a driver never holds it. What processes need of each row is numbers: every node
makes a file of them, once, which all its processes map into their memory, so that none has a copy of its own.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayalign.data.checked import WRONG, DamagedFile
from rayalign.object_store import BLOCK_BYTES
from rayalign.storage import Store

INDEX = "index.arrow"

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dataset", pa.int32()),
        ("file", pa.int32()),
        ("source_row", pa.int64()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("size", pa.uint32()),
        ("checksum", pa.uint32()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)
"""One line per pair: where it came from (sort order), where it is (a shard's number, a `checked.Place`), how long it is."""

SOURCE = ("dataset", "file", "source_row")
"""The columns that lines are in the order of."""

BATCH_ROWS = 65_536
"""Lines that are held while the index is written."""

NUMBERS = {
    name: np.dtype(INDEX_SCHEMA.field(name).type.to_pandas_dtype())
    for name in ("start", "size", "checksum", "shard", "prompt_tokens", "chosen_tokens", "rejected_tokens")
}
"""The columns of a node's file, one behind the other; behind them stands their CRC-32."""

CRC_BYTES = 4

KEPT_SECONDS = 24 * 3600
"""How long a node's file stays after it was last opened. (What has mapped it keeps it.)"""

Numbers = Mapping[str, NDArray[Any]]
"""The columns of NUMBERS, each [num_rows], read-only."""


class NoRoom(ValueError):
    """A node has no place for its file; says what to do."""


@dataclass(frozen=True)
class WrittenIndex:
    """What the manifest must know of an index, and the shards that it names."""

    num_rows: int
    sha256: str
    shards: frozenset[int]


def write_index(folder: Store, tables: Iterable[pa.Table]) -> WrittenIndex:
    """Writes the index of a folder's shards; `tables` have lines of INDEX_SCHEMA, in the order of their sources."""
    num_rows, shards, last = 0, set[int](), None
    with (folder / INDEX).writing() as file:
        hashed = _Hashed(file)
        with pa.ipc.new_file(hashed, INDEX_SCHEMA) as writer:
            for batch in _in_batches(tables):
                first, end = ([batch[name][row].as_py() for name in SOURCE] for row in (0, -1))
                order = pc.sort_indices(batch, sort_keys=[(name, "ascending") for name in SOURCE]).to_numpy()
                in_order = (last is None or last < first) and bool((np.diff(order) == 1).all())
                assert in_order, "lines are not in the order of the sources"
                last = end
                num_rows += batch.num_rows
                shards.update(batch["shard"].unique().to_pylist())
                writer.write_batch(batch)
        hashed.flush()
    return WrittenIndex(num_rows, hashed.digest.hexdigest(), frozenset(shards))


def _in_batches(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.cast(INDEX_SCHEMA))
        if sum(some.num_rows for some in waiting) >= BATCH_ROWS:
            yield from pa.concat_tables(waiting).combine_chunks().to_batches()
            waiting = []
    if waiting:
        yield from pa.concat_tables(waiting).combine_chunks().to_batches()


class _Hashed:
    """A file that is written, as pyarrow writes one, with the hash of what was."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file stays open: it is not whole yet."""


@contextlib.contextmanager
def opened_index(file: Store, sha256: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """The index, compared with its hash; lines that are read of it are mapped, and stay. Raises DamagedFile."""
    with contextlib.ExitStack() as stack:
        copy = stack.enter_context(tempfile.NamedTemporaryFile()) if file.local_path is None else None
        if sha256 not in (_hash_of(file, copy) for _ in range(2)):
            raise DamagedFile(f"{file.location} {WRONG}. The same command makes it anew.")
        yield pa.ipc.open_file(pa.memory_map(str(file.local_path if copy is None else copy.name)))


def _hash_of(file: Store, copy: IO[bytes] | None) -> str:
    """The hash of a file that is read once, and copied on the way."""
    digest = hashlib.sha256()
    if copy is not None:
        copy.seek(0)
        copy.truncate()
    try:
        with file.open_file() as content:
            while block := content.read(BLOCK_BYTES):
                digest.update(block)
                if copy is not None:
                    copy.write(block)
    except FileNotFoundError:
        raise DamagedFile(f"{file.location} is missing. The same command makes it anew.") from None
    if copy is not None:
        copy.flush()
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def numbers_of(file: Store, sha256: str, num_rows: int) -> Numbers:
    """The numbers of an index of so many lines, from this node's file, which is made where there is none. Raises DamagedFile
    for another index, and NoRoom."""
    copy = _folder_of_node() / f"{sha256}.numbers"
    found = _mapped(copy, num_rows)
    if found is None:
        with copy.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _mapped(copy, num_rows) or _made(copy, file, sha256, num_rows)
    return found


def check_index(file: Store, sha256: str, num_rows: int) -> None:
    """Reads an index anew, and makes this node's file of it. Raises DamagedFile for another than it should be, and
    NoRoom."""
    _made(_folder_of_node() / f"{sha256}.numbers", file, sha256, num_rows)


def _folder_of_node() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rayalign-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(0, "it is another user's")
    except OSError as error:
        raise _no_room(folder, error) from None
    return folder


def _mapped(copy: Path, num_rows: int) -> Numbers | None:
    """The numbers in a node's file; None where there is none that is whole."""
    try:
        content = np.memmap(copy, np.uint8, "r")
        os.utime(copy)
    except (FileNotFoundError, ValueError):  # ValueError: it is empty
        return None
    numbers, checksum = np.asarray(content[:-CRC_BYTES]), content[-CRC_BYTES:].tobytes()
    row_bytes = sum(kind.itemsize for kind in NUMBERS.values())
    if len(numbers) != num_rows * row_bytes or zlib.crc32(numbers.data) != int.from_bytes(checksum, "little"):
        return None
    columns, end = {}, 0
    for name, kind in NUMBERS.items():
        start, end = end, end + num_rows * kind.itemsize
        columns[name] = numbers[start:end].view(kind)
    return columns


def _made(copy: Path, file: Store, sha256: str, num_rows: int) -> Numbers:
    """Makes a node's file, and deletes those that nothing has opened for long."""
    for old in copy.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
    partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.partial")
    with opened_index(file, sha256) as index:
        batches = [index.get_batch(number) for number in range(index.num_record_batches)]
        if sum(batch.num_rows for batch in batches) != num_rows:
            raise DamagedFile(f"{file.location} has another number of lines than its manifest says.")
        try:
            with partial.open("wb") as made:
                checksum = 0
                for name, batch in itertools.product(NUMBERS, batches):
                    numbers = batch[name].to_numpy()
                    checksum = zlib.crc32(numbers, checksum)
                    made.write(numbers)
                made.write(checksum.to_bytes(CRC_BYTES, "little"))
            os.replace(partial, copy)
        except OSError as error:
            raise _no_room(copy.parent, error) from None
        finally:
            partial.unlink(missing_ok=True)
    found = _mapped(copy, num_rows)
    assert found is not None, copy
    return found


def _no_room(folder: Path, error: OSError) -> NoRoom:
    return NoRoom(
        f"{folder}, where each node keeps numbers of the encoded records: can't be written ({error.strerror}). Make room "
        "there, or name another folder in the variable TMPDIR on every node."
    )
