"""Raw lines of a byte range of a data file: what the readers of JSON lines and CSV stand on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rayalign.storage import Store

MAX_ROW_BYTES = 256 * 2**20
BLOCK_BYTES = 4 * 2**20
BOM = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""How UTF-16 text begins, as Excel and PowerShell write it, and UTF-8 never does."""


class Item(NamedTuple):
    """A raw row and the bytes [start, end) of the file that hold it; `line` is the number of its first line, from 1."""

    start: int
    end: int
    line: int
    raw: Any


def raw_lines(location: str, *, start: int = 0, end: int | None = None, line: int = 1) -> Iterator[Item]:
    """The lines in a byte range without their ends and a byte order mark; raw is None for one of more than MAX_ROW_BYTES.

    The range starts at the line whose number is `line`.
    """
    parts: list[bytes] = []
    size = 0
    for block in _blocks(location, start, end):
        *ends, rest = block.split(b"\n")
        for tail in ends:
            size += len(tail)
            yield _item(start, size + 1, line, [*parts, tail])
            start, line, parts, size = start + size + 1, line + 1, [], 0
        size += len(rest)
        if size <= MAX_ROW_BYTES:
            parts.append(rest)
    if size:
        yield _item(start, size, line, parts)


def _item(start: int, num_bytes: int, line: int, parts: list[bytes]) -> Item:
    if num_bytes - 1 > MAX_ROW_BYTES:
        return Item(start, start + num_bytes, line, None)
    content = b"".join(parts)
    return Item(start, start + num_bytes, line, content if start else content.removeprefix(BOM))


def _blocks(location: str, start: int, end: int | None) -> Iterator[bytes]:
    """The bytes of a range. Raises ValueError where the file is UTF-16 text."""
    filesystem, path = Store(location).resolve()
    with filesystem.open_input_file(path) as file:
        file.seek(start)
        left = (file.size() if end is None else end) - start
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            if not start and block.startswith(UTF_16_MARKS):
                raise ValueError(f"{location} is UTF-16 text, which isn't read. Save it as UTF-8.")
            left -= len(block)
            start += len(block)
            yield block


def read_range(location: str, *, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a range as a whole."""
    return b"".join(_blocks(location, start, end))
