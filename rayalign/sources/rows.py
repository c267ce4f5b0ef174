"""Reads the raw rows of a data file, whole or cut into spans that tasks read side by side; `formats` parses what comes out.

Row numbers start at 0 and count unreadable rows too, so that a number means the same row whatever is wrong with the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rayalign.formats.records import RecordError
from rayalign.sources import arrow_rows, csv_rows, json_rows, parquet_rows
from rayalign.sources.lines import Item

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""The containers that are read."""

Row = dict[str, Any] | RecordError


@dataclass(frozen=True)
class Span:
    """Rows of a file that can be read without the ones before: in a text file, the bytes [start, end) from line `line` on; in
    an Arrow file, those from row `line` on of the batch at [start, end)."""

    first_row: int
    num_rows: int
    start: int = 0
    end: int = 0
    line: int = 1


class TextReader(NamedTuple):
    """How a text file is read: its raw rows, from anywhere, and what parses one."""

    items: Callable[..., Iterator[Item]]
    parse: Callable[[Item], Row]


def count_rows(location: str) -> int:
    """The number of rows, unreadable ones included; raises ValueError where the file as a whole can't be read."""
    if _is_arrow(location):
        return arrow_rows.count_rows(location)
    reader = _reader(location)
    return parquet_rows.count_rows(location) if reader is None else sum(1 for _ in reader.items(location))


def spans_of(location: str, num_rows: int) -> list[Span]:
    """The file cut into spans of about `num_rows` rows; raises ValueError as `count_rows` does."""
    if _is_arrow(location):
        return [Span(*place) for place in arrow_rows.cut(location, num_rows)]
    reader = _reader(location)
    if reader is None:
        return [Span(first, size) for first, size in parquet_rows.cut(location, num_rows)]
    spans: list[Span] = []
    first: Item | None = None
    size = end = 0
    for row, item in enumerate(reader.items(location)):
        if first is None or size == num_rows:
            if first is not None:
                spans.append(Span(row - size, size, first.start, end, first.line))
            first, size = item, 0
        size, end = size + 1, item.end
    if first is not None:
        spans.append(Span(num_rows * len(spans), size, first.start, end, first.line))
    return spans


def read_rows(location: str, span: Span | None = None, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Row]]:
    """The rows of a span (None: the file) with the given numbers (None: all); one that can't be read is a RecordError."""
    wanted = None if rows is None else set(rows)
    if _is_arrow(location):
        place = arrow_rows.Place(span.first_row, span.num_rows, span.start, span.end, span.line) if span else None
        yield from arrow_rows.read(location, place, wanted=wanted)
        return
    reader = _reader(location)
    first = span.first_row if span else 0
    if reader is None:
        yield from parquet_rows.read(location, first=first, num_rows=span.num_rows if span else None, wanted=wanted)
        return
    items = reader.items(location, start=span.start, end=span.end, line=span.line) if span else reader.items(location)
    last = max(wanted, default=-1) if wanted is not None else None
    for row, item in enumerate(items, start=first):
        if last is not None and row > last:
            return
        if wanted is None or row in wanted:
            yield row, reader.parse(item)


def _is_arrow(location: str) -> bool:
    return location.lower().endswith(".arrow")


def _reader(location: str) -> TextReader | None:
    """The reader for a file's suffix; None for parquet."""
    name = location.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{location}: expected a file that ends in {', '.join(SUFFIXES)}.")
    if name.endswith(".parquet"):
        return None
    if name.endswith(".csv"):
        return TextReader(csv_rows.items, csv_rows.parser(location))
    if name.endswith(".json") and json_rows.holds_array(location):
        return TextReader(json_rows.array_items, json_rows.parse_element)
    return TextReader(json_rows.line_items, json_rows.parse_line)
