"""Rows of JSON lines and of JSON arrays; a row that is broken comes as a RecordError and the next ones follow."""

import json
import re
from collections.abc import Iterator
from typing import Any

from rayalign.formats.json_text import RepeatedKey, parse_json, parse_start
from rayalign.formats.records import RecordError
from rayalign.sources.lines import BOM, MAX_ROW_BYTES, Item, raw_lines, read_range

PEEK_BYTES = 4096
IF_ARRAY = "; if the file holds a JSON array, call it .json"
SPACE = re.compile(r"[ \t\r\n]*")


def holds_array(location: str) -> bool:
    """Whether a .json file holds an array; else it should hold JSON lines. Raises ValueError for one object over many lines."""
    head = read_range(location, end=PEEK_BYTES).removeprefix(BOM).lstrip()
    if re.match(rb"\{\s*\n", head):
        raise ValueError(f"{location} holds one JSON object; expected an array of records, or one record a line.")
    return head.startswith(b"[")


def line_items(location: str, *, start: int = 0, end: int | None = None, line: int = 1) -> Iterator[Item]:
    """The lines that aren't blank."""
    for item in raw_lines(location, start=start, end=end, line=line):
        if item.raw is None or item.raw.strip():
            yield item


def parse_line(item: Item) -> dict[str, Any] | RecordError:
    if item.raw is None:
        return RecordError("too long", f"line {item.line}: more than {MAX_ROW_BYTES // 2**20} MiB")
    hint = IF_ARRAY if item.line == 1 and item.raw.lstrip().startswith(b"[") else ""
    try:
        return as_object(parse_json(item.raw.decode()), f"line {item.line}", hint)
    except UnicodeDecodeError as error:
        return RecordError(
            "not UTF-8", f"line {item.line}: byte {error.start + 1} is {item.raw[error.start]:#04x}, {error.reason}"
        )
    except json.JSONDecodeError as error:
        return RecordError("broken JSON", f"line {item.line}, column {error.colno}: {error.msg}{hint}")
    except ValueError as error:
        return RecordError("broken JSON", f"line {item.line}: {error}{hint}")


def array_items(location: str, *, start: int = 0, end: int | None = None, line: int = 1) -> Iterator[Item]:
    """The elements of an array, or those in a byte range that starts and ends with an element; `line` counts elements here.

    Raises ValueError where the text is no JSON: an array can't be read past its first mistake.
    """
    try:
        text = read_range(location, start=start, end=end).decode()
        if not start:
            opening = SPACE.match(text.removeprefix("\ufeff"))
            position = text.index("[", opening.end() if opening else 0) + 1
            start = len(text[:position].encode())
        else:
            position = 0
        while True:
            position, start = _skip_space(text, position, start)
            if position == len(text) and end is not None:
                return
            if text.startswith("]", position):
                if text[position + 1 :].strip():
                    raise ValueError("there is more after the closing ]")
                return
            value, after = parse_start(text, position)
            size = len(text[position:after].encode())
            yield Item(start, start + size, line, value)
            position, start = _skip_space(text, after, start + size)
            line += 1
            if text.startswith(",", position):
                position, start = position + 1, start + 1
            elif not text.startswith("]", position) and not (position == len(text) and end is not None):
                raise ValueError(f"expected , or ] after element {line - 2}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location} is not a JSON array: {_words(error)}.") from None


def parse_element(item: Item) -> dict[str, Any] | RecordError:
    where = f"element {item.line - 1}"
    if isinstance(item.raw, RepeatedKey):
        return RecordError("broken JSON", f"{where}: {item.raw}")
    return as_object(item.raw, where)


def as_object(value: Any, where: str, hint: str = "") -> dict[str, Any] | RecordError:
    if isinstance(value, dict):
        return value
    return RecordError("not an object", f"{where}: expected a JSON object {{...}}, found {type(value).__name__}{hint}")


def _skip_space(text: str, position: int, start: int) -> tuple[int, int]:
    """Position and byte offset of the next character that isn't white space (which is one byte each)."""
    space = SPACE.match(text, position)
    after = space.end() if space else position
    return after, start + after - position


def _words(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
