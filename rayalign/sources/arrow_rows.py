"""Rows of Arrow files: streams, as `datasets` saves them, and files with a footer, whose inside is a stream, too.

A record batch can be read by its place in the file alone, so that a span of rows names the bytes of its batch.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from rayalign.formats.records import RecordError
from rayalign.sources.names import require_distinct
from rayalign.sources.parquet_rows import row_of
from rayalign.storage import Store

FILE_MAGIC = b"ARROW1\0\0"
"""How a file with a footer begins; the stream stands behind it."""

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class Place(NamedTuple):
    """Some rows of record batches that follow each other: the first one's number in the file, how many, the batches' bytes
    [start, end), and the first row's number in the first batch."""

    first_row: int
    num_rows: int
    start: int
    end: int
    first_in_batch: int = 0


def count_rows(location: str) -> int:
    return sum(batch.num_rows for batch in _batches(location))


def cut(location: str, num_rows: int) -> Iterator[Place]:
    """Spans of at most `num_rows`: small batches together, a large one in pieces."""
    held: Place | None = None
    for batch in _batches(location):
        if held is not None and held.num_rows + batch.num_rows <= num_rows:
            held = held._replace(num_rows=held.num_rows + batch.num_rows, end=batch.end)
            continue
        if held is not None:
            yield from _pieces(held, num_rows)
        held = batch
    if held is not None:
        yield from _pieces(held, num_rows)


def _pieces(place: Place, num_rows: int) -> Iterator[Place]:
    for first in range(0, place.num_rows, num_rows):
        size = min(num_rows, place.num_rows - first)
        yield Place(place.first_row + first, size, place.start, place.end, first)


def read(location: str, place: Place | None, *, wanted: set[int] | None) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """The rows at a place (None: the file's), or the wanted ones of them."""
    for at in _batches(location) if place is None else (place,):
        inside = range(at.first_row, at.first_row + at.num_rows)
        if wanted is not None and wanted.isdisjoint(inside):
            continue
        with _opened(location) as file:
            schema = _stream(file, location).schema
            file.seek(at.start)
            first = at.first_row - at.first_in_batch
            while file.tell() < at.end:
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
                batch.validate()
                for row in range(max(first, inside.start), min(first + batch.num_rows, inside.stop)):
                    if wanted is None or row in wanted:
                        yield row, _row(batch, row - first)
                first += batch.num_rows


def _batches(location: str) -> Iterator[Place]:
    """Where the record batches stand. Raises ValueError where the file is none of Arrow's, or is cut off."""
    with _opened(location) as file:
        stream = _stream(file, location)
        first, start = 0, file.tell()
        for batch in stream:
            yield Place(first, batch.num_rows, start, file.tell())
            first, start = first + batch.num_rows, file.tell()
        file.seek(file.tell() - len(END_OF_STREAM))
        if file.read(len(END_OF_STREAM)) != END_OF_STREAM:
            raise pa.ArrowInvalid("it has no end, so that rows may be missing")


def _stream(file: Any, location: str) -> Any:
    """The reader of a file's stream, at its first batch. Raises ValueError for columns that can't be read batch by batch, and
    for two of one name."""
    file.seek(len(FILE_MAGIC) if file.read(len(FILE_MAGIC)) == FILE_MAGIC else 0)
    stream = pa.ipc.open_stream(file)
    require_distinct(stream.schema.names, location)
    encoded = [field.name for field in stream.schema if "dictionary<" in str(field.type)]
    if encoded:
        raise ValueError(
            f"{location}: the column {encoded[0]} is dictionary-encoded, which isn't read. Write the rows as parquet: "
            "datasets.load_from_disk(FOLDER).to_parquet('rows.parquet')."
        )
    return stream


@contextlib.contextmanager
def _opened(location: str) -> Iterator[Any]:
    """The file, mapped into memory where it is a local one; within it, what is wrong with its content is a ValueError."""
    store = Store(location)
    try:
        if store.local_path is not None:
            file = pa.memory_map(str(store.local_path))
        else:
            filesystem, path = store.resolve()
            file = filesystem.open_input_file(path)
        with file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the storage's own, not what was found in the file
            raise
        raise ValueError(f"{location} is not a readable Arrow file: {error}") from None


def _row(batch: pa.RecordBatch, i: int) -> dict[str, Any] | RecordError:
    try:
        batch.slice(i, 1).validate(full=True)
    except pa.ArrowInvalid as error:
        return RecordError("not UTF-8" if "UTF8" in str(error) else "unreadable row", str(error))
    return row_of(batch, i)
