"""Log-probabilities under the reference as data: the files that hold them beside the encoded pairs, in a folder named by what
they depend on (`reference.key`).

Stored for each response token, since algorithms weigh tokens differently. A shard holds SHARD_ROWS rows, or more in a folder
whose name says so (`folder_name`). It is complete or absent, so that a pass that was cut short goes on with the shards that are
missing. It is an Arrow file behind a head of fixed size, which says where each row stands and what its checksum is; the head's
own checksum is of the file's place, too, so that no shard is taken for another. `reference.precompute` writes them, `store`
reads them along with the pairs.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayalign.data.checked import CheckedFile, Place, forget, keep_open, names_noted, pack
from rayalign.storage import Store

SHARD_ROWS = 64
"""Rows of one shard, which one task computes, of data sets that are not large."""

MOST_SHARDS = 10_000
"""More there are not: of a larger data set, a shard holds twice as many rows, or four times, and so on."""

SIDES = ("chosen", "rejected", "companion")
"""What there are log-probs of: the two responses, and a companion's row where this is the same in every epoch."""

STORED_NAMES = {"chosen": "chosen", "rejected": "rejected", "companion": "damaged"}
"""The column of each side in a shard; a companion's has the name of the first one whose rows were stored."""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(STORED_NAMES[side], pa.list_(pa.float32()), nullable=False) for side in SIDES),
    ]
)
"""One row: the pair's id and, token by token, the log-probabilities of its chosen response, of its rejected one, and of the
chosen one in the companion's row; empty where there is no such response."""


@dataclass(frozen=True)
class ReferenceLogps:
    """A pair's log-probabilities under the reference, one for each token; see REFERENCE_SCHEMA."""

    chosen: list[float]
    rejected: list[float]
    companion: list[float]


HEAD = np.dtype([("start", "<u4"), ("size", "<u4"), ("checksum", "<u4")])
"""An entry of a shard's head, for each of the rows that it has place for; behind them stands the head's own checksum (4
bytes)."""

CRC_OF_CHECKED = 0x2144DF1C
"""The CRC-32 of any bytes with their own CRC-32 (little-endian) behind them."""


def folder_name(key: str, data: Store, num_rows: int) -> str:
    """The folder beside a data set's shards that log-probs with a key are in, or will be; of a large data set it says how many
    rows a shard has, unless there are smaller ones already."""
    rows = SHARD_ROWS
    while num_rows > rows * MOST_SHARDS:
        rows *= 2
    return key if rows == SHARD_ROWS or (data / key).sizes() else f"{key}_by_{rows}"


def shard_rows(folder: Store) -> int:
    """The rows of each shard in a folder."""
    number = re.fullmatch(".*_by_([0-9]+)", folder.name)
    return int(number[1]) if number else SHARD_ROWS


def head_bytes(folder: Store) -> int:
    """The size of the head of each shard in a folder."""
    return shard_rows(folder) * HEAD.itemsize + 4


def write_reference_shard(file: Store, ids: Sequence[str], rows: Sequence[ReferenceLogps]) -> None:
    """Writes the rows of one shard, a record batch for each, so that a row is one small read."""

    def batches() -> Iterator[pa.RecordBatch]:
        for pair_id, row in zip(ids, rows, strict=True):
            columns = [pa.array([pair_id]), *(pa.array([getattr(row, side)], pa.list_(pa.float32())) for side in SIDES)]
            yield pa.RecordBatch.from_arrays(columns, schema=REFERENCE_SCHEMA)

    content, places = pack(REFERENCE_SCHEMA, batches())
    entries, start = np.zeros(shard_rows(file.parent), HEAD), head_bytes(file.parent)
    entries[: len(places)] = [(place.start + start, place.size, place.checksum) for place in places]
    head = entries.tobytes()
    file.write_bytes(head + zlib.crc32(head, _place_checksum(file)).to_bytes(4, "little") + content)


def _place_checksum(file: Store) -> int:
    """Of what tells a shard from those of other data sets, attempts and references: the last parts of where it lies."""
    return zlib.crc32("/".join(file.location.split("/")[-4:]).encode())


def shard_name(shard: int) -> str:
    """The file of the rows SHARD_ROWS * shard and on."""
    return f"part_{shard:06d}.arrow"


SHARD_NAME = re.compile(r"part_([0-9]{6,})\.arrow")


def missing_shards(folder: Store, rows: NDArray[np.integer[Any]]) -> list[int]:
    """The shards that hold some of `rows` and are not there yet or have no whole head, and all that a run found damaged."""
    noted, head = names_noted(folder), head_bytes(folder)
    there = {name for name, size in folder.sizes().items() if size > head}
    wanted = {shard for shard in np.unique(rows // shard_rows(folder)).tolist() if shard_name(shard) not in there}
    return sorted(wanted | {int(number[1]) for number in map(SHARD_NAME.fullmatch, noted) if number})


def forget_damage(folder: Store, shards: Sequence[int]) -> None:
    """Takes back what runs have noted about shards that were computed again."""
    forget(folder, map(shard_name, shards))


def drop_damaged(folder: Store) -> None:
    """Deletes the shards that runs found damaged, and the notes about them: they are missing then."""
    names = names_noted(folder)
    for name in names:
        (folder / name).delete()
    forget(folder, names)


class ReferenceReader:
    """Fetches rows by their number; keeps the most recently used shards open."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._shard_rows, self._head_bytes = shard_rows(folder), head_bytes(folder)
        self._open = keep_open(self._open_shard, folder)

    def read_row(self, row: int) -> pa.RecordBatch:
        """The row with this number, of REFERENCE_SCHEMA. Raises DamagedFile."""
        file, entries = self._open(row // self._shard_rows)
        place = Place(*(int(value) for value in entries[row % self._shard_rows]))
        return file.read_batch(place, REFERENCE_SCHEMA)

    def _open_shard(self, shard: int) -> tuple[CheckedFile, NDArray[Any]]:
        store = self._folder / shard_name(shard)
        file = CheckedFile(store)
        head = file.read(Place(0, self._head_bytes, CRC_OF_CHECKED), checksum_before=_place_checksum(store))
        return file, np.frombuffer(head[:-4], HEAD)
