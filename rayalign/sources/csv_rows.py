"""Rows of CSV files; lists such as images and history stand in their cells as JSON."""

import csv
import re
from collections.abc import Callable, Iterator
from typing import Any

from rayalign.formats.columns import from_text
from rayalign.formats.records import RecordError
from rayalign.sources.lines import Item, raw_lines
from rayalign.sources.names import require_distinct

UNCLOSED = "unexpected end of data"
"""What the csv module says where a quote is open at the end."""
CARRIAGE_RETURN = "new-line character seen in unquoted field"
"""How it begins where a carriage return stands inside of a cell."""

OPENING, CLOSING = re.compile('(?:^|,)"'), re.compile('[^"]*(?:""[^"]*)*"(?!")')
"""A quote at the beginning of a cell, and the text up to the next quote that isn't doubled."""


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
    header = [name.strip() or f"(column {number})" for number, name in enumerate(_header(location).raw, start=1)]
    require_distinct(header, location)

    def parse(item: Item) -> dict[str, Any] | RecordError:
        if isinstance(item.raw, csv.Error):
            return RecordError("broken CSV", f"line {item.line}: {_words(item.raw)}")
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


def _words(error: csv.Error) -> str:
    """What is wrong with a row, and what helps."""
    if str(error).startswith(CARRIAGE_RETURN):
        return "a carriage return stands in a cell without quotes; put cells that hold one into quotes"
    return f"{error}; long texts and images are better kept in .jsonl or .parquet files"


def _header(location: str) -> Item:
    """The column names; `end` and `line` say where the rows begin. Raises ValueError where there are none."""
    for item in _split(location, start=0, end=None, line=1):
        if not isinstance(item.raw, csv.Error):
            return item
        if str(item.raw).startswith(CARRIAGE_RETURN):
            raise ValueError(
                f"{location}: its lines end in carriage returns (\\r), which aren't read as line ends. Save it with line feeds "
                "(\\n or \\r\\n)."
            )
        break
    raise ValueError(f"{location}: expected a first line with the names of the columns.")


def _split(location: str, *, start: int, end: int | None, line: int) -> Iterator[Item]:
    """Rows as the csv module splits them; it takes lines one by one, so that each row's bytes are known. Of a row that it can't
    split it stops at any character: the row ends where its last quoted cell does."""
    taken, held = Item(start, start, line - 1, b""), list[str]()

    def texts() -> Iterator[str]:
        nonlocal taken
        for item in raw_lines(location, start=start, end=end, line=line):
            taken = item
            # Bytes that aren't UTF-8 become lone surrogates, which `parse` reports for their row alone.
            held.append((item.raw or b"").decode(errors="surrogateescape") + "\n")
            yield held[-1]

    lines = texts()
    reader = csv.reader(lines, strict=True)
    while True:
        begin, first_line = taken.end, taken.line + 1
        held.clear()
        try:
            cells: list[str] | csv.Error | None = next(reader, None)
        except csv.Error as error:
            cells = error
            is_open = False
            for text in held:
                is_open = _ends_in_quotes(text, is_open)
            while is_open and cells is error:
                held.clear()
                cells = error if next(lines, None) is not None else csv.Error(UNCLOSED)
                is_open = any(_ends_in_quotes(text, True) for text in held)
        if isinstance(cells, csv.Error) and str(cells) == UNCLOSED:
            raise ValueError(
                f"{location}: a quote that is opened in the row of line {first_line} is never closed. Close it, or double it "
                "where it is part of the text."
            )
        if cells is None:
            return
        if cells:
            yield Item(begin, taken.end, first_line, cells)


def _ends_in_quotes(line: str, starts_in_quotes: bool) -> bool:
    """Whether a cell that stands in quotes goes on in the next line."""
    place, is_open = 0, starts_in_quotes
    while found := CLOSING.match(line, place) if is_open else OPENING.search(line, place):
        place, is_open = found.end(), not is_open
    return is_open
