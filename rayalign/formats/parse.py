"""From a raw row to a PreferenceRecord: the record format is recognised by the row's columns, one file per format.

`sources` finds and reads the rows; `data.encode` takes the records on.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from rayalign.config.plugins import Plugin
from rayalign.formats import rlaif_v, sharegpt, swift2, swift4, trl
from rayalign.formats.cells import plain
from rayalign.formats.records import PreferenceRecord, RecordError


class Format(NamedTuple):
    """A record format: the columns it needs, in words; whether a row's columns are its own; and the row's record."""

    name: str
    needs: str
    matches: Callable[[Set[str]], bool]
    parse: Callable[..., PreferenceRecord]


FORMATS = (
    Format("ms-swift 4", swift4.NEEDS, swift4.matches, swift4.parse),
    Format("ShareGPT", sharegpt.NEEDS, sharegpt.matches, sharegpt.parse),
    Format("RLAIF-V", rlaif_v.NEEDS, rlaif_v.matches, rlaif_v.parse),
    Format("TRL", trl.NEEDS, trl.matches, trl.parse),
    Format("ms-swift 2", swift2.NEEDS, swift2.matches, swift2.parse),
)
"""A row may hold the columns of several formats; the first of these that matches reads it."""

UNSUPPORTED_COLUMNS = ("videos", "video", "audios", "audio", "tools", "objects")
"""Columns that would change what the model sees, so that a row can't be read without them."""


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
    """The record of a raw row, by the formats of plugins (`own`) before those that come along; a cell that holds None counts as
    absent. Raises RecordError where the row can't be used."""
    cells = {name: value for name, cell in row.items() if (value := plain(cell, column=name)) is not None}
    for column in UNSUPPORTED_COLUMNS:
        if cells.get(column):
            raise RecordError("unsupported content", "records hold text and images only", field=column)
    formats = (*own, *FORMATS)
    for format in formats:
        if format.matches(cells.keys()):
            return format.parse(cells, id=id)
    known = "; ".join(f"{format.name} ({format.needs})" for format in formats)
    raise RecordError("unknown format", f"the row has the columns {', '.join(cells) or '(none)'}; known formats: {known}")
