"""Rows of parquet files, in small batches of one row group at a time."""

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayalign.formats.records import Unreadable
from rayalign.sources.names import require_distinct
from rayalign.storage import Store

BATCH_ROWS = 32
MAX_READS = 8
"""A row group can only be read from its start, so it is cut into at most as many spans."""


def count_rows(location: str) -> int:
    with _open(location) as file:
        return int(file.metadata.num_rows)


def cut(location: str, num_rows: int) -> Iterator[tuple[int, int]]:
    """Spans (first row, number of rows) of about `num_rows`, none of which goes over the border of a row group."""
    with _open(location) as file:
        start = 0
        for group in range(file.num_row_groups):
            inside = file.metadata.row_group(group).num_rows
            step = max(num_rows, math.ceil(inside / MAX_READS))
            for first in range(0, inside, step):
                yield start + first, min(step, inside - first)
            start += inside


def read(location: str, *, first: int, num_rows: int | None, wanted: set[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows from `first` on, or the wanted ones of them; row groups that hold none of these are not read."""
    with _open(location) as file:
        last = file.metadata.num_rows if num_rows is None else first + num_rows
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = range(max(start, first), min(end, last))
            if inside and (wanted is None or not wanted.isdisjoint(inside)):
                yield from _group_rows(file, group, location=location, start=start, inside=inside, wanted=wanted)
            start = end


def _group_rows(
    file: pq.ParquetFile, group: int, *, location: str, start: int, inside: range, wanted: set[int] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
    while start < inside.stop:
        try:
            batch = next(batches)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{location}: row group {group} can't be read: {error}") from error
        for i in range(batch.num_rows):
            if start + i in inside and (wanted is None or start + i in wanted):
                yield start + i, row_of(batch, i)
        start += batch.num_rows


def _open(location: str) -> pq.ParquetFile:
    """The file. Raises ValueError where it is none of parquet's, and where two columns have one name."""
    filesystem, path = Store(location).resolve()
    try:
        file = pq.ParquetFile(filesystem.open_input_file(path))
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the storage's own, not what was found in the file
            raise
        raise ValueError(f"{location} is not a readable parquet file: {error}") from None
    require_distinct(names, location)
    return file


def row_of(batch: pa.RecordBatch, i: int) -> dict[str, Any]:
    """A row of a batch as Python's own types; a cell that can't be is `Unreadable`."""
    try:
        row: dict[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except (ValueError, OverflowError):
        return {name: _cell(column[i]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return row


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Unreadable("not UTF-8", str(error))
    except (ValueError, OverflowError) as error:
        return Unreadable("unreadable cell", f"{value.type}: {error}")
