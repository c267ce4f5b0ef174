"""Encoded records on storage: shards of pairs, one index, one manifest. Written by `prepare`, read at random by every worker.

A data set is complete or absent: the manifest is written last, and it names the files that count, with their hashes. What a
pair is stands in `pairs`, what shards are like in `shards`, what the index says of a pair in `index`.
"""

import functools
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayalign.data.checked import (
    CheckedFile,
    DamagedFile,
    Place,
    forget,
    keep_open,
    names_noted,
    read_whole,
    require_undamaged,
    sha256_of,
    side_by_side,
)
from rayalign.data.index import INDEX, INDEX_SCHEMA, NoRoom, WrittenIndex, check_index, numbers_of, opened_index
from rayalign.data.pairs import ENCODED_SCHEMA, REFERENCE_COLUMNS
from rayalign.data.pairs import EncodedPair as EncodedPair  # what others have of the folder, they have from here
from rayalign.data.pairs import Rows as Rows
from rayalign.data.pairs import TokenCounts as TokenCounts
from rayalign.data.pairs import from_batch as from_batch
from rayalign.data.reference_store import REFERENCE_SCHEMA, SIDES, STORED_NAMES, ReferenceReader
from rayalign.data.shards import read_pair
from rayalign.data.shards import shard_name as shard_name
from rayalign.storage import Store

logger = logging.getLogger(__name__)

DROPPED, REMARKS, MANIFEST = "dropped.json", "remarks.json", "manifest.json"


@dataclass(frozen=True)
class PreparedData:
    """A complete encoded data set. Pickles as its location; opens files only where it is read. `reference` names the folder
    beside the shards whose log-probabilities are read along with the pairs."""

    store: Store
    attempt: str
    num_rows: int
    hashes: tuple[tuple[str, str], ...] = ()
    """The SHA-256 of each file beside the shards, by its name."""
    reference: str | None = None

    @classmethod
    def find(cls, store: Store) -> "PreparedData | None":
        """The data set of a cache folder; None where there is none, or only the remains of an unfinished or damaged one.
        (Single shards may be damaged: `damaged_shards`.)"""
        try:
            manifest = (store / MANIFEST).read_json_object()
            found = cls._of_manifest(store, manifest)
            check_index(*found._index_file)
            for name in (DROPPED, REMARKS):
                found._read(name)
        except FileNotFoundError:
            return None
        except NoRoom:
            raise
        except ValueError as error:
            logger.warning("Data: encoding anew what was encoded before: %s", error)
            return None
        return found

    @classmethod
    def _of_manifest(cls, store: Store, manifest: Mapping[str, Any]) -> "PreparedData":
        """Raises DamagedFile where the manifest is none of this folder's."""
        match manifest:
            case {"key": store.name, "attempt": str(attempt), "num_rows": int(num_rows), "sha256": dict(hashes)}:
                if set(hashes) == {INDEX, DROPPED, REMARKS} and re.fullmatch("[0-9a-z]+", attempt):
                    return cls(store, attempt, num_rows, tuple(sorted(hashes.items())))
        raise DamagedFile(f"{(store / MANIFEST).location} is no list of this folder's files.")

    @classmethod
    def finish(
        cls,
        store: Store,
        *,
        attempt: str,
        index: WrittenIndex,
        dropped: Sequence[Mapping[str, Any]],
        remarks: Sequence[tuple[int, str]] = (),
    ) -> "PreparedData":
        """Completes a data set whose shards and index stand under `attempt`: writes the dropped records, what there is to say
        about them all, then the manifest.

        Raises ValueError where shards that the index names are not there: on another machine's disk, or lost.
        """
        _require_shards(store / attempt, index)
        contents = {
            DROPPED: json.dumps(list(dropped), indent=2).encode(),
            REMARKS: json.dumps(list(remarks), indent=2).encode(),
        }
        for name, content in contents.items():
            (store / attempt / name).write_bytes(content)
        hashes = {INDEX: index.sha256} | {name: sha256_of(content) for name, content in contents.items()}
        manifest = {
            "key": store.name,
            "attempt": attempt,
            "num_rows": index.num_rows,
            "sha256": dict(sorted(hashes.items())),
        }
        (store / MANIFEST).write_json(manifest)
        return cls._of_manifest(store, manifest)

    @property
    def folder(self) -> Store:
        return self.store / self.attempt

    @property
    def _index_file(self) -> tuple[Store, str, int]:
        """The index, its hash and its number of lines."""
        return self.folder / INDEX, dict(self.hashes)[INDEX], self.num_rows

    def _read(self, name: str) -> bytes:
        return read_whole(self.folder / name, dict(self.hashes)[name])

    def index(self) -> pa.Table:
        """INDEX_SCHEMA, sorted by source: the order that row numbers count in. Raises DamagedFile."""
        file, sha256, _ = self._index_file
        with opened_index(file, sha256) as index:
            return index.read_all()

    def rows_of_datasets(self) -> Counter[int]:
        """How many pairs there are of each data set, by its number. Raises DamagedFile."""
        file, sha256, _ = self._index_file
        counts = Counter[int]()
        with opened_index(file, sha256) as index:
            for number in range(index.num_record_batches):
                for found in pc.value_counts(index.get_batch(number)["dataset"]).to_pylist():
                    counts[found["values"]] += found["counts"]
        return counts

    def rows_of(self, ids: frozenset[str]) -> Mapping[str, int]:
        """The row numbers of some pairs, of those that are there, in the order of the data. The index is read for them once."""
        return _rows_of(self, ids) if ids else {}

    def dropped(self) -> list[dict[str, Any]]:
        """The records left out, each with dataset, row, reason and detail. Raises DamagedFile."""
        dropped: list[dict[str, Any]] = json.loads(self._read(DROPPED))
        return dropped

    def remarks(self) -> list[tuple[int, str]]:
        """What the preparation had to say about the data set: logging's level and words. Raises DamagedFile."""
        return [(level, words) for level, words in json.loads(self._read(REMARKS))]

    def shards(self) -> list[int]:
        """The numbers of all shards, sorted."""
        return list(self._shard_ends())

    def damaged_shards(self) -> list[int]:
        """The shards that are missing, end too early, or were found damaged by a run."""
        needed = self._shard_ends()
        sizes, noted = self.folder.sizes(), names_noted(self.folder)
        names = [shard_name(shard) for shard in needed]
        wrong = [name in noted or sizes.get(name, -1) < size for name, size in zip(names, needed.values(), strict=True)]
        return list(itertools.compress(needed, wrong))

    def _shard_ends(self) -> dict[int, int]:
        """The bytes up to the end of the last pair of each shard."""
        numbers = numbers_of(*self._index_file)
        shards = numbers["shard"]
        ends = np.zeros(int(shards.max()) + 1, np.int64)
        np.maximum.at(ends, shards, numbers["start"] + numbers["size"])
        return {int(shard): int(ends[shard]) for shard in np.flatnonzero(ends)}

    def mend(self, shards: Sequence[int], folder: Store, index: pa.Table) -> bool:
        """Puts shards that were written anew into `folder` in the place of damaged ones, where their pairs are the same to the
        byte; returns whether they are. `index` has the lines of INDEX_SCHEMA for them, in order."""
        mine = self.index()
        if not index.cast(INDEX_SCHEMA).equals(mine.filter(pc.is_in(mine["shard"], pa.array(shards, pa.int32())))):
            return False
        names = [shard_name(shard) for shard in shards]
        for name in names:
            (self.folder / name).write_bytes((folder / name).read_bytes())
        forget(self.folder, names)
        return True

    def require_undamaged(self) -> None:
        """Raises DamagedFile where a run has found files of this data set damaged that were not made anew yet."""
        require_undamaged(self.folder)
        if self.reference:
            require_undamaged(self.folder / self.reference)

    def token_counts(self) -> TokenCounts:
        numbers = numbers_of(*self._index_file)
        return TokenCounts(*(numbers[f"{part}_tokens"] for part in ("prompt", "chosen", "rejected")))

    def reader(self) -> "PairReader":
        return PairReader(self)


@functools.lru_cache(maxsize=2)
def _rows_of(data: PreparedData, ids: frozenset[str]) -> Mapping[str, int]:
    column = data.index()["id"]
    is_wanted = pc.is_in(column, pa.array(list(ids), pa.string()))
    return dict(zip(column.filter(is_wanted).to_pylist(), np.flatnonzero(is_wanted).tolist(), strict=True))


def _require_shards(folder: Store, index: WrittenIndex) -> None:
    missing = sorted({shard_name(number) for number in index.shards} - folder.sizes().keys())
    if missing:
        raise ValueError(
            f"{folder.location}: lacks {len(missing)} of the shards that were written there, such as {missing[0]}. Do all "
            "nodes see the same folder? Give a --cache_dir on a file system that all of them mount, or a URL."
        )


class PairReader:
    """Fetches pairs by row number; keeps the most recently used shards open."""

    def __init__(self, data: PreparedData) -> None:
        numbers = numbers_of(*data._index_file)
        self._folder = data.folder
        self._places = [numbers[name] for name in ("shard", *Place._fields)]
        self._open = keep_open(lambda shard: CheckedFile(self._folder / shard_name(shard)), self._folder)
        self._reference = ReferenceReader(data.folder / data.reference) if data.reference else None
        self._schema = ENCODED_SCHEMA
        if self._reference is not None:
            for side, column in zip(SIDES, REFERENCE_COLUMNS, strict=True):
                self._schema = self._schema.append(REFERENCE_SCHEMA.field(STORED_NAMES[side]).with_name(column))

    def read(self, rows: Rows | Sequence[int]) -> pa.Table:
        """The pairs with these row numbers, in this order, as a table of ENCODED_SCHEMA, and of REFERENCE_COLUMNS where there
        is a reference. Raises DamagedFile."""
        numbers = [int(row) for row in rows]
        reads = [functools.partial(self._read_pair, row) for row in numbers]
        if self._reference is not None:
            reads += [functools.partial(self._reference.read_row, row) for row in numbers]
        found = side_by_side(reads, self._folder)
        pairs, logps = found[: len(numbers)], found[len(numbers) :]
        if self._reference is not None:
            pairs = [self._with_logps(*both) for both in zip(pairs, logps, strict=True)]
        return pa.Table.from_batches(pairs, schema=self._schema)

    def _read_pair(self, row: int) -> pa.RecordBatch:
        shard, *place = (int(values[row]) for values in self._places)
        return read_pair(self._open(shard), Place(*place))

    def _with_logps(self, pair: pa.RecordBatch, logps: pa.RecordBatch) -> pa.RecordBatch:
        (stored,), (pair_id,) = logps["id"].to_pylist(), pair["id"].to_pylist()
        assert stored == pair_id, f"{self._folder.location} holds the log-probs of {stored} where {pair_id} stands"
        columns = [*pair.columns, *(logps[STORED_NAMES[side]] for side in SIDES)]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)
