"""Rows of CSV files; lists such as images and history stand in their cells as JSON."""

import csv
from collections.abc import Callable, Iterator
from typing import Any

from rayalign.formats.columns import from_text
from rayalign.formats.records import RecordError
from rayalign.sources.lines import Item, raw_lines

UNCLOSED = "unexpected end of data"
"""What the csv module says where a quote is open at the end."""
TOO_LONG = "field larger than field limit"
"""How it begins where a cell has more than 131,072 characters; it stops in the middle of the row."""


def items(location: str, *, start: int = 0, end: int | None = None, line: int = 1) -> Iterator[Item]:
    """The rows below the header as lists of cells, or the csv.Error of one that can't be split.

    Raises ValueError where a quote is never closed: every row behind it would be part of one cell.
    """
    if not start:
        header = _header(location)
        start, line = header.end, header.line + 1
    yield from _split(location, start=start, end=end, line=line)


def parser(location: str) -> Callable[[Item], dict[str, Any] | RecordError]:
    """The function that names the cells of a row of this file; empty cells count as absent."""
    header: list[str] = _header(location).raw

    def parse(item: Item) -> dict[str, Any] | RecordError:
        if isinstance(item.raw, csv.Error):
            words = f"line {item.line}: {item.raw}; long texts and images are better kept in .jsonl or .parquet files"
            return RecordError("broken CSV", words)
        if len(item.raw) > len(header):
            return RecordError(
                "broken CSV", f"line {item.line}: {len(item.raw)} cells, but the header names {len(header)} columns"
            )
        row: dict[str, Any] = {}
        for name, cell in zip(header, item.raw, strict=False):
            try:
                cell.encode()
                row[name] = from_text(name, cell) if cell else None
            except UnicodeEncodeError:
                return RecordError("not UTF-8", f"line {item.line}: not UTF-8 text", field=name)
            except ValueError as error:
                return RecordError("wrong type", f"line {item.line}: {error}", field=name)
        return row

    return parse


def _header(location: str) -> Item:
    """The column names; `end` and `line` say where the rows begin. Raises ValueError where there are none."""
    for item in _split(location, start=0, end=None, line=1):
        if isinstance(item.raw, csv.Error):
            break
        return item
    raise ValueError(f"{location}: expected a first line with the names of the columns.")


def _split(location: str, *, start: int, end: int | None, line: int) -> Iterator[Item]:
    """Rows as the csv module splits them; it takes lines one by one, so that each row's bytes are known."""
    taken, quotes = Item(start, start, line - 1, b""), 0

    def texts() -> Iterator[str]:
        nonlocal taken, quotes
        for item in raw_lines(location, start=start, end=end, line=line):
            taken = item
            quotes += (item.raw or b"").count(b'"')
            # Bytes that aren't UTF-8 become lone surrogates, which `parse` reports for their row alone.
            yield (item.raw or b"").decode(errors="surrogateescape") + "\n"

    lines = texts()
    reader = csv.reader(lines, strict=True)
    while True:
        begin, first_line, quotes = taken.end, taken.line + 1, 0
        try:
            cells: list[str] | csv.Error | None = next(reader, None)
        except csv.Error as error:
            cells = error
            if str(error).startswith(TOO_LONG):  # the rest of its row: up to where each quote is closed
                while quotes % 2 and cells is error:
                    cells = error if next(lines, None) is not None else csv.Error(UNCLOSED)
        if isinstance(cells, csv.Error) and str(cells) == UNCLOSED:
            raise ValueError(
                f"{location}: a quote that is opened in the row of line {first_line} is never closed. Close it, or double it "
                "where it is part of the text."
            )
        if cells is None:
            return
        if cells:
            yield Item(begin, taken.end, first_line, cells)
