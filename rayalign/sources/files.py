"""Finds the data files behind a --dataset argument: file, folder, glob or registered name, local or remote.

`rows` reads them; `formats` parses their rows.
"""

import difflib
import fnmatch
import functools
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from rayalign.sources import rows as raw
from rayalign.sources.catalogue import CATALOGUE, registered_files
from rayalign.sources.rows import SUFFIXES, Row, Span
from rayalign.sources.saved_datasets import without_their_notes
from rayalign.sources.splits import require_one_split
from rayalign.storage import Store, is_url

logger = logging.getLogger(__name__)

NOT_READ = re.compile(
    r"(?:\.(?:ndjson|jsonlines|tsv|arrow|feather|parq|pq|orc|avro|xlsx?|ods|pkl|pickle|msgpack|tfrecords?)"
    r"|(?<!\.tar)\.(?:gz|zst|bz2|xz|lz4)"
    r"|\.(?:jsonl?|csv|parquet)\.\w+)$",
    re.IGNORECASE,
)
"""Endings of files that seem to hold rows, and are none of SUFFIXES; .arrow files of a folder are read where a saved data set
lists them. Archives beside the rows hold pictures as a rule."""

TO_BE_READ = "Unpack what is compressed, write other kinds as .jsonl or .parquet, and name an Arrow file by its own path."


@dataclass(frozen=True)
class SourceFile:
    """A data file with what tells it from an earlier version: its size in bytes, and its time of change (ns) or commit."""

    location: str
    size: int
    modified: str

    @property
    def name(self) -> str:
        return Store(self.location).name


@dataclass(frozen=True)
class Dataset:
    """A --dataset argument as given, what errors call it, its files, and how many of its records to draw (None: all);
    `pictures`: the folder that holds its images (None: each file's own)."""

    argument: str
    name: str
    files: tuple[SourceFile, ...]
    sample: int | None
    pictures: str | None = None

    def folder_of(self, file: SourceFile) -> Store:
        """What relative image paths in a file's rows start from, and absolute ones must lie below."""
        return Store(file.location).parent if self.pictures is None else Store(self.pictures)

    def num_drawn(self, num_rows: int) -> int:
        """How many of its rows are taken; raises ValueError where more are asked for than there are."""
        if self.sample is not None and self.sample > num_rows:
            raise ValueError(f"--dataset {self.argument}: {self.sample} records are asked for, and there are {num_rows}.")
        return num_rows if self.sample is None else self.sample


def resolve_dataset(argument: str) -> Dataset:
    """The data set that `NAME_OR_PATH[#N]` names; raises ValueError that says what was looked for where, and what to do."""
    place, sample = split_sample(argument)
    if place in CATALOGUE:
        hub = tuple(SourceFile(file.location, file.size, file.commit) for file in registered_files(place))
        return Dataset(argument, place, hub, sample)
    store = Store.at(place)
    try:
        files = _find(store, argument=argument)
    except pa.ArrowInvalid as error:
        raise ValueError(f"Dataset '{argument}': {error}. Give a path, s3://..., gs://... or file://...") from None
    require_one_split(argument, [file.location for file in files])
    return Dataset(argument, store.name, files, sample)


def whole_argument(argument: str) -> str:
    """The same data set named from any working folder: a path is made absolute, a URL or registered name stays."""
    place, sample = split_sample(argument)
    if place in CATALOGUE or is_url(place):
        return argument
    return Store.at(place).location + (f"#{sample}" if sample else "")


def count_rows(file: SourceFile) -> int:
    """The number of rows of a file, unreadable ones included."""
    return raw.count_rows(file.location)


def spans_of(file: SourceFile, num_rows: int) -> list[Span]:
    """The file cut into spans of about `num_rows` rows, each of which can be read without the rows before it."""
    return raw.spans_of(file.location, num_rows)


def read_rows(file: SourceFile, span: Span | None = None, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Row]]:
    """The rows of a span (None: of the file) with the given sorted numbers (None: all).

    Yields the row's number in the file, from 0, and the row, or the RecordError of one that can't be read.
    """
    return raw.read_rows(file.location, span, rows)


def split_sample(argument: str) -> tuple[str, int | None]:
    place, sign, number = argument.rpartition("#")
    if not sign:
        place, number = argument, ""
    elif not is_url(argument) and Store.at(argument).exists():
        return argument, None
    elif not re.fullmatch("[1-9][0-9]*", number):
        raise ValueError(
            f"Dataset '{argument}': #{number} is no number of records. Write NAME#1000 to draw 1000 of them, or leave it out."
        )
    if not place.strip():
        raise ValueError(
            f"Dataset '{argument}': there is no name. Give a file, a folder, a glob or one of {', '.join(CATALOGUE)}."
        )
    return place, int(number) if number else None


def _find(store: Store, *, argument: str) -> tuple[SourceFile, ...]:
    info = store.info()
    kinds = ", ".join(SUFFIXES)
    if info.type == pafs.FileType.Directory:
        found, nothing = _inside(store), f"the folder {store.location} holds no file that ends in {kinds}"
    elif info.type == pafs.FileType.File:
        if not store.name.lower().endswith(SUFFIXES):
            raise ValueError(f"Dataset '{argument}': {store.location} must end in {kinds}.")
        return (_source(store, info),)
    elif any(sign in store.location for sign in "*?["):
        found, nothing = _glob(store), f"nothing matches {store.location} and ends in {kinds}"
    else:
        raise _not_there(store, argument=argument)
    if not found.files:
        instead = f", but {_listed(found.not_read)}. {TO_BE_READ}" if found.not_read else "."
        raise ValueError(f"Dataset '{argument}': {nothing}{instead}")
    if found.not_read:
        _warn_once(f"Data: {argument}: passed over, and they look like data: {_listed(found.not_read)}. {TO_BE_READ}")
    return found.files


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@functools.cache
def _warn_once(words: str) -> None:
    """Logs a warning; a data set is looked for several times in a run."""
    logger.warning("%s", words)


def _not_there(store: Store, *, argument: str) -> ValueError:
    near = _near_names(store)
    hint = f" Did you mean {near}?" if near else ""
    names = ", ".join(CATALOGUE)
    return ValueError(
        f"Dataset '{argument}': there is no file or folder {store.location}, nor a registered name (these are: {names}).{hint}"
    )


class _Found(NamedTuple):
    """The data files of a place, sorted, and what seems to hold rows beside them and isn't read, by its path inside."""

    files: tuple[SourceFile, ...]
    not_read: Sequence[str]


def _inside(folder: Store) -> _Found:
    """The data files at any depth of a folder; hidden files and folders are skipped. Of a local folder each real file counts
    once, whatever links lead to it, and what is no file (a pipe, a socket) not at all."""
    inner = [store.location[len(folder.location) :].lstrip("/") for store in _below(folder)]
    visible = [name for name in inner if not any(part.startswith(".") for part in name.split("/"))]
    wanted = {name for name in without_their_notes(folder, visible) if name.lower().endswith(SUFFIXES)}
    found = [(store, store.info()) for store in (folder / name for name in visible if name in wanted)]
    files = tuple(_source(store, info) for store, info in found if info.type == pafs.FileType.File)
    return _Found(files, [name for name in visible if name not in wanted and _seems_to_hold_rows(name)])


def _seems_to_hold_rows(path: str) -> bool:
    name = posixpath.basename(path)
    return NOT_READ.search(name) is not None and not name.startswith("cache-")  # what `datasets` keeps beside a saved data set


def _below(folder: Store) -> list[Store]:
    """What lies at any depth of a folder, sorted; of a local one without what is no file or folder, and each real one once."""
    if folder.local_path is None:
        return folder.list(recursive=True)
    return [folder / path for path in sorted(_walk(folder.local_path))]


def _walk(folder: Path) -> Iterator[str]:
    """The files and folders below a local folder by their paths inside it; links are followed, to no place twice."""
    seen = {os.path.realpath(folder)}
    for where, folders, files in os.walk(folder, followlinks=True):
        for name in sorted([*folders, *files]):
            path = os.path.join(where, name)
            real = os.path.realpath(path)
            if real not in seen and (os.path.isdir(real) or os.path.isfile(real)):
                seen.add(real)
                yield os.path.relpath(path, folder)
            elif name in folders:
                folders.remove(name)  # so that it isn't walked through again


def _glob(pattern: Store) -> _Found:
    """The data files that match a pattern, or lie in a folder that does, each real one once, whatever links match; `**` stands
    for any depth."""
    parts = pattern.location.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base, rest = Store("/".join(parts[:first]) or "/"), parts[first:]
    found: set[SourceFile] = set()
    not_read: set[str] = set()
    for store in _below(base) if len(rest) > 1 else base.list():
        path = store.location[len(base.location) :].strip("/")
        if _matches(path.split("/"), rest):
            info = store.info()
            if info.type == pafs.FileType.Directory:
                inside = _inside(store)
                found.update(inside.files)
                not_read.update(f"{path}/{name}" for name in inside.not_read)
            elif store.name.lower().endswith(SUFFIXES):
                found.add(_source(store, info))
            elif _seems_to_hold_rows(path):
                not_read.add(path)
    once: dict[str, SourceFile] = {}
    for file in sorted(found, key=lambda file: file.location):
        local = Store(file.location).local_path
        once.setdefault(file.location if local is None else os.path.realpath(local), file)
    return _Found(tuple(once.values()), sorted(not_read))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(
            _matches(parts[i:], pattern[1:])
            for i in range(len(parts) + 1)
            if not any(part.startswith(".") for part in parts[:i])
        )
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _source(store: Store, info: pafs.FileInfo) -> SourceFile:
    return SourceFile(store.location, int(info.size or 0), str(info.mtime_ns or ""))


def _near_names(store: Store) -> str | None:
    """A registered name, or a path beside the given one, that is spelt almost like it."""
    registered = difflib.get_close_matches(store.name.lower(), CATALOGUE, n=1)
    if registered:
        return registered[0]
    beside = difflib.get_close_matches(store.name, [sibling.name for sibling in store.parent.list()], n=1)
    return posixpath.join(store.parent.location, beside[0]) if beside else None
