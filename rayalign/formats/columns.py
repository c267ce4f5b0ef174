"""What becomes of a row's columns before and beside its format: `--columns FROM=TO`, and the columns that nothing reads.

`data.prepare` renames, parses, and collects what is left out, to say it once for each data set.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from rayalign.config.flags import did_you_mean
from rayalign.formats.cells import plain
from rayalign.formats.json_text import parse_json
from rayalign.formats.parse import UNSUPPORTED_COLUMNS, Format, format_of, known_columns
from rayalign.formats.pictures import looks_like_picture
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
        if _is_empty(value):
            continue
        before = result.get(target)
        if not _is_empty(before) and plain(before, column=target) != plain(value, column=source):
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
    """The row's filled columns that its format does not read; none where that can't be told: no format matches, or one of a
    plugin that doesn't say what it reads."""
    columns = {name for name, value in row.items() if value is not None}
    format = format_of(columns, own)
    if format is None or format.reads is None:
        return ()
    return tuple(name for name in row if name in columns and name not in format.reads and name not in UNSUPPORTED_COLUMNS)


def require_pictures_read(row: Mapping[str, Any], record: PreferenceRecord, own: Sequence[Format] = ()) -> None:
    """Raises RecordError for a record without pictures whose row has a column, not read, that looks as if it held them."""
    if record.images:
        return
    for name in unread_columns(row, own):
        if looks_like_picture(name, plain(row[name], column=name)):
            words = (
                f"this looks like a picture, the record has no other, and no record format reads a column of this name; pass "
                f"--columns {name}=images, or take the column out of the rows"
            )
            raise RecordError(PICTURE_NOT_READ, words, field=name)


def _typed(column: str, text: str) -> Any:
    """As `from_text`, for a text that may not come from a container of texts: what is of no such type stays as it is."""
    try:
        return from_text(column, text)
    except ValueError:
        return text


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, list, tuple, Mapping, Set)) and len(value) == 0)
