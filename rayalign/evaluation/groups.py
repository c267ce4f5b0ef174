"""The rows of a pool's work in groups: read where they are worked on, so that neither the driver nor Ray carries a data set.

`pool` hands the groups to its actors. A group is the same rows whatever the number of actors, and whatever was done before.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from rayalign.data.rows import Sources, file_label
from rayalign.data.tasks import cut_into_tasks
from rayalign.formats.records import RecordError
from rayalign.sources.files import SourceFile, read_rows
from rayalign.sources.rows import Span

Row = Mapping[str, Any]

GROUP_ROWS = 64
"""Rows of a group: so many results are written as one file, and computed again after a kill."""


class RowSource(Protocol):
    """Where the rows of a group are."""

    def read(self, numbers: Sequence[int]) -> Iterator[Row | RecordError]:
        """The rows with these numbers, in order; a RecordError for one that can't be read."""
        ...


@dataclass(frozen=True)
class Group:
    """Rows that are worked on together: of each its key, which no other row has, its place among all, and its number in the
    source."""

    keys: tuple[str, ...]
    positions: tuple[int, ...]
    numbers: tuple[int, ...]
    source: RowSource

    @property
    def num_rows(self) -> int:
        return len(self.keys)

    def read(self) -> list[Row | RecordError]:
        return list(self.source.read(self.numbers))

    def without(self, keys: Set[str]) -> "Group":
        """The group without the rows that have one of these keys."""
        left = [i for i, key in enumerate(self.keys) if key not in keys]
        if len(left) == self.num_rows:
            return self
        taken: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in left) for name in ("keys", "positions", "numbers")}
        return dataclasses.replace(self, **taken)


@dataclass(frozen=True)
class GivenRows:
    """Rows that travel with their group."""

    rows: tuple[Row, ...]

    def read(self, numbers: Sequence[int]) -> Iterator[Row | RecordError]:
        return (self.rows[number] for number in numbers)


@dataclass(frozen=True)
class FileRows:
    """Rows of a span of a data file. Each is read as {"id", "folder", "row"}: its key, the folder that relative image paths
    start from, and the raw row in any record format."""

    file: SourceFile
    span: Span
    label: str
    folder: str

    def read(self, numbers: Sequence[int]) -> Iterator[Row | RecordError]:
        for number, row in read_rows(self.file, self.span, numbers):
            yield row if isinstance(row, RecordError) else {"id": f"{self.label}:{number}", "folder": self.folder, "row": row}


def groups_of_rows(rows: Iterable[Row], *, key: str = "id", size: int = GROUP_ROWS) -> list[Group]:
    """The groups of rows at hand, each with a text under `key` that no other has; raises ValueError for a key twice."""
    groups: list[Group] = []
    seen: set[str] = set()
    some: list[Row] = []

    def close() -> None:
        if some:
            first = len(seen) - len(some)
            keys, numbers = tuple(str(row[key]) for row in some), tuple(range(len(some)))
            groups.append(Group(keys, tuple(first + i for i in numbers), numbers, GivenRows(tuple(some))))
            some.clear()

    for row in rows:
        name = str(row[key])
        if name in seen:
            raise ValueError(f"Two rows have the same {key}, {name}. Give each its own: what is done is kept by it.")
        seen.add(name)
        some.append(row)
        if len(some) == size:
            close()
    close()
    return groups


def groups_of_datasets(sources: Sources, *, seed: int, size: int = GROUP_ROWS) -> list[Group]:
    """The groups of the records of data sets, NAME#N draws made with the seed; `FileRows` says what each is read as. The keys
    are the records' ids in training: the file's name and the row's number in it. Ray must run. Raises ValueError where there is
    no record."""
    groups: list[Group] = []
    position = 0
    for part in (part for task in cut_into_tasks(sources, seed) for part in task.parts):
        label, dataset = file_label(sources, part), sources.datasets[part.dataset]
        file = dataset.files[part.file]
        folder = dataset.folder_of(file).location
        for span in part.spans:
            rows = range(span.first_row, span.first_row + span.num_rows)
            wanted = rows if part.rows is None else [row for row in part.rows.tolist() if row in rows]
            for start in range(0, len(wanted), size):
                numbers = tuple(wanted[start : start + size])
                positions = tuple(range(position, position + len(numbers)))
                keys = tuple(f"{label}:{n}" for n in numbers)
                groups.append(Group(keys, positions, numbers, FileRows(file, span, label, folder)))
                position += len(numbers)
    if not groups:
        raise ValueError(f"--dataset {' '.join(d.argument for d in sources.datasets)}: there is no record in it.")
    return groups
