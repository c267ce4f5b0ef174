"""What is said once about each data set: columns that nothing reads, data without pictures for a model that looks at them,
renamed columns that no row has. `prepare` collects it from its tasks, and keeps it beside the encoded records.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayalign.config.flags import nearest
from rayalign.formats.columns import PICTURE_NOT_READ, Renames, renamed, unread_columns
from rayalign.formats.parse import Format, known_columns
from rayalign.formats.records import Responses

SEEN_SCHEMA = pa.schema(
    [
        ("num_images", pa.int32()),
        ("crosses_seam", pa.bool_()),
        ("unread", pa.list_(pa.string())),
        ("renamed", pa.list_(pa.string())),
    ]
)
"""Of a record: its pictures, and whether a token would cross from its prompt into a response; and the columns not read and
those renamed, where its task meets them for the first time."""

MOST_NAMES, LONGEST_NAME = 30, 60

Remark = tuple[int, str]
"""A level of `logging`, and words."""


class ColumnsSeen:
    """The columns that one task has met in its rows."""

    def __init__(self, renames: Renames, own: Sequence[Format]) -> None:
        self._renames, self._own = renames, own
        self._unread: set[str] = set()
        self._renamed: set[str] = set()

    def add(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        """What is new in a row, for SEEN_SCHEMA. Raises RecordError as `renamed` does."""
        sources = (source for source, _ in self._renames if row.get(source) is not None)
        unread = unread_columns(renamed(row, self._renames), self._own)
        return {"unread": _new(unread, self._unread), "renamed": _new(sources, self._renamed)}


def _new(names: Iterable[str], known: set[str]) -> list[str]:
    new = sorted({short for name in names if (short := printable(name)) not in known})[: MOST_NAMES + 1 - len(known)]
    known.update(new)
    return new


def printable(words: str, *, longest: int = LONGEST_NAME) -> str:
    """Text out of a row, fit for a log and for files: on one line, valid Unicode, and not too long."""
    line = " ".join(words[: 2 * longest].encode(errors="replace").decode().split())
    return line if len(line) <= longest else f"{line[:longest]}..."


@dataclass
class RowsSeen:
    """What tasks have reported of the rows of one data set: how many there are, how many are kept and how many of these cross
    the seam and have a chosen and a rejected response, their pictures, the columns."""

    num_rows: int = 0
    kept: int = 0
    crossing: int = 0
    chosen: int = 0
    rejected: int = 0
    num_images: int = 0
    unread: set[str] = field(default_factory=set)
    renamed: set[str] = field(default_factory=set)

    def add(self, outcome: pa.Table) -> None:
        """Adds the outcomes of some more of the rows."""
        kept = outcome.filter(pc.is_null(outcome["reason"]))
        self.num_rows += outcome.num_rows
        self.kept += kept.num_rows
        self.crossing += pc.sum(kept["crosses_seam"]).as_py() or 0
        self.chosen += pc.sum(pc.greater(kept["chosen_tokens"], 0)).as_py() or 0
        self.rejected += pc.sum(pc.greater(kept["rejected_tokens"], 0)).as_py() or 0
        self.num_images += pc.sum(kept["num_images"]).as_py() or 0
        self.unread |= _names(outcome, "unread")
        self.renamed |= _names(outcome, "renamed")


def remarks(
    seen: Sequence[RowsSeen],
    arguments: Sequence[str],
    renames: Renames,
    *,
    looks_at_pictures: str | None,
    responses: Responses = "both",
) -> list[Remark]:
    """What to say about the data sets `arguments`, from what was `seen` of each. `looks_at_pictures`: the model that does
    (None: it reads text only); `responses`: which ones records are encoded with."""
    said: list[Remark] = []
    for own, argument in zip(seen, arguments, strict=True):
        unread = sorted(own.unread)
        if unread:
            words = f"{argument}: columns that are not read: {_listed(unread)}.{_of_other_formats(unread)}{_misspelt(unread)}"
            said.append((logging.INFO, words))
        if looks_at_pictures is not None and own.kept and not own.num_images:
            words = (
                f"{argument}: NO RECORD HAS A PICTURE, and {looks_at_pictures} is a vision-language model: of these records it "
                "learns from the text alone. If their pictures stand in a column of another name, pass --columns NAME=images."
            )
            said.append((logging.WARNING, words))
        if own.crossing:
            said.append((logging.INFO, f"{argument}: {_crossing(own.crossing, own.kept)}"))
    kept, counts = sum(own.kept for own in seen), [sum(own.chosen for own in seen), sum(own.rejected for own in seen)]
    if responses == "either" and kept and 0 in counts:
        has, lacks = ("a good", "a bad") if counts[0] else ("a bad", "a good")
        words = (
            f"{' '.join(arguments)}: NO RECORD HAS {lacks.upper()} RESPONSE, and all {kept:,} have {has} one: what tells them "
            "apart can't be learned from these. Look at the records' labels, or add records of the other kind."
        )
        said.append((logging.WARNING, words))
    met = {name for own in seen for name in own.renamed}
    for source, target in renames:
        if printable(source) not in met:
            said.append((logging.WARNING, f"{' '.join(arguments)}: --columns {source}={target}: no row has a column {source}."))
    return said


def _crossing(count: int, total: int) -> str:
    return (
        f"in {count:,} of {total:,} records, a token would cross from the prompt into a response (such as a line break at the "
        "end of the one and at the beginning of the other). They keep the prompt's tokens as generation sees them, and the "
        "response's behind these."
    )


def unread_pictures(dropped: Sequence[Mapping[str, Any]], num_rows: Mapping[str, int], *, limit: float) -> str | None:
    """Words for the first data set of which more than this fraction of the rows have their only picture in a column that
    nothing reads; `num_rows` are those of each data set."""
    for dataset, total in num_rows.items():
        fields = Counter(line["field"] for line in dropped if (line["dataset"], line["reason"]) == (dataset, PICTURE_NOT_READ))
        if fields.total() > limit * total:
            names = [name for name, _ in fields.most_common()]
            renames = " ".join(f"{name}=images" for name in names[:MOST_NAMES])
            return (
                f"{dataset}: {fields.total()} of {total} records have what looks like their picture in a column that no record "
                f"format reads: {_listed(names)}. Pass --columns {renames}, or take the column out of the rows."
            )
    return None


def _names(outcome: pa.Table, column: str) -> set[str]:
    return {name for names in outcome[column].drop_null().to_pylist() for name in names}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (" and others" if len(names) > MOST_NAMES else "")


def _of_other_formats(unread: Sequence[str]) -> str:
    """A sentence on the columns that record formats read, but not those of the rows that have them."""
    known = [name for name in unread if name in (known_columns() or ())]
    return f" Only other record formats read {_listed(known)}." if known else ""


def _misspelt(unread: Sequence[str]) -> str:
    """Advice on the columns whose names are almost those of columns that are read."""
    known = known_columns() or ()
    meant = [(name, near) for name in unread if name not in known and (near := nearest(name, known))]
    return f" Did you mean --columns {' '.join(f'{name}={near}' for name, near in meant)}?" if meant else ""
