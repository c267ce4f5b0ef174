"""What becomes of a row's columns before and beside its format: `--columns FROM=TO`, and the columns that nothing reads.

`data.prepare` renames, parses, and collects what is left out, to say it once for each data set.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.config.flags import did_you_mean
from rayalign.formats.cells import is_empty, is_missing, plain, unread_keys
from rayalign.formats.json_text import parse_json
from rayalign.formats.parse import FORMATS, UNSUPPORTED_COLUMNS, Format, format_of, known_columns
from rayalign.formats.pictures import looks_like_picture, names_video_or_audio
from rayalign.formats.records import PreferenceRecord, RecordError

Renames = tuple[tuple[str, str], ...]
"""(FROM, TO) of --columns."""

JSON_COLUMNS = frozenset(
    ("images", "image", "history", "messages", "conversations", "rejected_messages", "rejected_images", "rejected_image")
)
"""Columns whose texts may be JSON lists or objects; in the others a text is a text, whatever it looks like."""

PICTURE_NOT_READ = "picture not read"
"""The reason of a record whose only picture stands in a column that nothing reads."""


def parse_renames(arguments: Sequence[str], own: Sequence[Format] = ()) -> Renames:
    """The (FROM, TO) of --columns; raises ValueError for what is none, and for a TO that no record format reads."""
    renames: list[tuple[str, str]] = []
    known = known_columns(own)
    for argument in arguments:
        source, sign, target = (part.strip() for part in argument.rpartition("="))
        if not (sign and source and target):
            raise ValueError(
                f"--columns {argument}: expected FROM=TO, the column's name in the rows and the name that a record format "
                "knows, such as image_path=images."
            )
        if "=" in source and re.search(r"[\s,]", source):
            raise ValueError(
                f"--columns {argument}: these are several renames in one word. Make each a word of its own (--columns a=images "
                "b=query), and in YAML an item of a list ([a=images, b=query])."
            )
        if source in dict(renames):
            raise ValueError(f"--columns {argument}: {source} is renamed twice. Give it one new name.")
        if known is not None and target not in known:
            raise ValueError(
                f"--columns {argument}: no record format reads a column {target}.{did_you_mean(target, known)} "
                f"Known are {', '.join(sorted(known))}."
            )
        renames.append((source, target))
    return tuple(renames)


def renamed(row: Mapping[str, Any], renames: Renames) -> Mapping[str, Any]:
    """The row with its columns renamed, all at once, so that two may change places. An empty cell gives way to a filled one.

    Raises RecordError where the row has both names, and their cells differ.
    """
    taken = {source for source, _ in renames}
    if taken.isdisjoint(row):
        return row
    result = {name: value for name, value in row.items() if name not in taken}
    for source, target in renames:
        value = row.get(source)
        if isinstance(value, str):
            value = _typed(target, value)
        if is_empty(value):
            continue
        before = result.get(target)
        if not is_empty(before) and plain(before, column=target) != plain(value, column=source):
            raise RecordError(
                "ambiguous columns",
                f"--columns {source}=...: the row has a {target!r} already, and they differ; rename one of them",
                field=target,
            )
        result[target] = value
    return result


def from_text(column: str, text: str) -> Any:
    """A cell that is text, as the type that its column holds: lists of images, history and messages stand there as JSON.

    Raises ValueError where it is none.
    """
    if column in JSON_COLUMNS and text.startswith(("[", "{")):
        return parse_json(text)
    if column == "margin":
        return float(text)
    if column == "label":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    return text


def unread_columns(row: Mapping[str, Any], own: Sequence[Format] = ()) -> tuple[str, ...]:
    """What is filled in the row and not read by its format, by name: `columns_beside`, and keys of messages and images."""
    beside, format = columns_beside(row, own), _format_of(row, own)
    if format not in FORMATS or format.reads is None:  # a plugin alone knows what it reads of a cell
        return beside
    inside = {f"{key!r} in {name}": None for name, cell in row.items() if name in format.reads for key in unread_keys(cell)}
    return (*beside, *inside)


def columns_beside(row: Mapping[str, Any], own: Sequence[Format] = ()) -> tuple[str, ...]:
    """The row's filled columns that its format does not read; none where that can't be told: no format matches, or one of a
    plugin that doesn't say what it reads."""
    format = _format_of(row, own)
    if format is None or format.reads is None:
        return ()
    known = (*format.reads, *UNSUPPORTED_COLUMNS)
    return tuple(name for name, value in row.items() if not is_missing(value) and name not in known)


def _format_of(row: Mapping[str, Any], own: Sequence[Format]) -> Format | None:
    return format_of({name for name, value in row.items() if not is_missing(value)}, own)


def require_pictures_read(row: Mapping[str, Any], record: PreferenceRecord, own: Sequence[Format] = ()) -> None:
    """Raises RecordError for a record without pictures whose row has a column, not read, that looks as if it held them, or
    videos or sounds."""
    if record.images:
        return
    for name in columns_beside(row, own):
        value = plain(row[name], column=name)
        if looks_like_picture(name, value):
            words = (
                f"this looks like a picture, the record has no other, and no record format reads a column of this name; pass "
                f"--columns {name}=images, or take the column out of the rows"
            )
            raise RecordError(PICTURE_NOT_READ, words, field=name)
        if names_video_or_audio(name) and isinstance(value, (str, bytes, list, Mapping)) and not is_empty(value):
            words = "this looks like a video or a sound, and records hold text and images only; take the column out of the rows"
            raise RecordError("unsupported content", words, field=name)


def _typed(column: str, text: str) -> Any:
    """As `from_text`, for a text that may not come from a container of texts: what is of no such type stays as it is."""
    try:
        return from_text(column, text)
    except ValueError:
        return text
