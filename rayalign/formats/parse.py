"""From a raw row to a PreferenceRecord: the record format is recognised by the row's columns, one file per format.

`sources` finds and reads the rows; `data.encode` takes the records on.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, NamedTuple

from rayalign.config.plugins import Plugin
from rayalign.formats import rlaif_v, sharegpt, swift2, swift4, trl
from rayalign.formats.cells import COMMON_COLUMNS, is_empty, is_missing, plain, refuse_other_rejected_images
from rayalign.formats.records import PreferenceRecord, RecordError


class Format(NamedTuple):
    """A record format: the columns it needs, in words; whether a row's columns are its own; the row's record; and all columns
    that it reads (None: not known)."""

    name: str
    needs: str
    matches: Callable[[Set[str]], bool]
    parse: Callable[..., PreferenceRecord]
    reads: Set[str] | None = None


FORMATS = (
    Format("ms-swift 4", swift4.NEEDS, swift4.matches, swift4.parse, COMMON_COLUMNS | swift4.READS),
    Format("ShareGPT", sharegpt.NEEDS, sharegpt.matches, sharegpt.parse, COMMON_COLUMNS | sharegpt.READS),
    Format("RLAIF-V", rlaif_v.NEEDS, rlaif_v.matches, rlaif_v.parse, COMMON_COLUMNS | rlaif_v.READS),
    Format("TRL", trl.NEEDS, trl.matches, trl.parse, COMMON_COLUMNS | trl.READS),
    Format("ms-swift 2", swift2.NEEDS, swift2.matches, swift2.parse, COMMON_COLUMNS | swift2.READS),
)
"""A row may hold the columns of several formats; the first of these that matches reads it."""

UNSUPPORTED_COLUMNS = ("videos", "video", "audios", "audio", "tools", "objects")
"""Columns that would change what the model sees, so that a row can't be read without them."""
HISTORY = "history"
"""The same where a format doesn't read it."""


def own_formats(plugins: Sequence[Plugin]) -> tuple[Format, ...]:
    """The record formats that plugins bring. Raises ValueError for what is no `Format`, and for a name that exists already."""
    formats: list[Format] = []
    for plugin in plugins:
        for format in plugin.formats:
            if not isinstance(format, Format) or not (callable(format.matches) and callable(format.parse)):
                raise ValueError(
                    f"--plugin {plugin.argument}: {format!r} in FORMATS is no record format. Write "
                    "Format(name, needs, matches, parse), as in rayalign/formats/parse.py."
                )
            if any(format.name == other.name for other in (*FORMATS, *formats)):
                raise ValueError(
                    f"--plugin {plugin.argument}: there is a record format named {format.name!r} already. Give it another name."
                )
            formats.append(format)
    return tuple(formats)


def parse_row(row: Mapping[str, Any], *, id: str, own: Sequence[Format] = ()) -> PreferenceRecord:
    """The record of a raw row, by the formats of plugins (`own`) before those that come along; a cell that holds None or
    NaN counts as absent. Raises RecordError where the row can't be used."""
    cells = {name: value for name, cell in row.items() if not is_missing(value := plain(cell, column=name))}
    for column in UNSUPPORTED_COLUMNS:
        if cells.get(column):
            raise RecordError("unsupported content", "records hold text and images only", field=column)
    format = format_of(cells.keys(), own)
    if format is None:
        known = "; ".join(f"{format.name} ({format.needs})" for format in (*own, *FORMATS))
        raise RecordError("unknown format", f"the row has the columns {', '.join(cells) or '(none)'}; known formats: {known}")
    if format.reads is not None and HISTORY not in format.reads and not is_empty(cells.get(HISTORY)):
        words = f"{format.name}'s records have none, so the turns before would be left out; put them into the messages"
        raise RecordError("unsupported content", words, field=HISTORY)
    record = format.parse(cells, id=id)
    if format in FORMATS:
        refuse_other_rejected_images(cells, record.images)
    return record


def format_of(columns: Set[str], own: Sequence[Format] = ()) -> Format | None:
    """The format that reads a row with these filled columns."""
    return next((format for format in (*own, *FORMATS) if format.matches(columns)), None)


def known_columns(own: Sequence[Format] = ()) -> Collection[str] | None:
    """The columns that any format reads; None where a plugin's format doesn't say."""
    reads = [format.reads for format in (*own, *FORMATS)]
    return None if None in reads else sorted({column for columns in reads if columns is not None for column in columns})
