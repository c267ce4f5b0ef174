"""Encoded records on storage: shards of pairs, one index, one manifest. Written by `prepare`, read at random by every worker.

A data set is complete or absent: the manifest is written last, and it names the files that count. A shard holds one Arrow
record batch per pair, so that one pair is one small read, on a disk and on an object store alike.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayalign.data.reference_store import REFERENCE_SCHEMA, SIDES, STORED_NAMES, ReferenceLogps, ReferenceReader
from rayalign.storage import Store

Rows = NDArray[np.int64]

ENCODED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("image_hashes", pa.list_(pa.string()), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
    ]
)
"""One encoded pair. Images are the compressed bytes of the source. A response that a row doesn't have is empty: the rejected
one of SFT's rows, one of the two of a record with a single labelled response."""


@dataclass(frozen=True)
class EncodedPair:
    """One row of ENCODED_SCHEMA: token ids of the prompt (image tokens expanded) and of both responses, and the images."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    images: list[bytes]
    image_hashes: list[str]
    margin: float = 0.0
    reference: ReferenceLogps | None = None
    """The log-probabilities under the reference, where they were computed beforehand; in columns of their own."""

    @property
    def num_tokens(self) -> int:
        """Length of the row `[prompt | chosen | rejected]`."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dataset", pa.int32()),
        ("file", pa.int32()),
        ("source_row", pa.int64()),
        ("shard", pa.string()),
        ("position", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)
"""One line per pair: where it came from (sort order), where it is, how long it is."""

REFERENCE_COLUMNS = tuple(f"reference_{side}" for side in SIDES)
"""What the columns of REFERENCE_SCHEMA are called beside those of ENCODED_SCHEMA."""

OPEN_SHARDS = 64


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the prepared rows, each [num_rows]."""

    prompt: Rows
    chosen: Rows
    rejected: Rows

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> "TokenCounts":
        """Those of some pairs."""
        sides = (
            [pair.prompt_ids for pair in pairs],
            [pair.chosen_ids for pair in pairs],
            [pair.rejected_ids for pair in pairs],
        )
        return cls(*(np.array([len(ids) for ids in side], dtype=np.int64) for side in sides))

    @property
    def num_rows(self) -> int:
        return len(self.prompt)

    def take(self, rows: Rows) -> "TokenCounts":
        """Those of some rows, in this order."""
        return TokenCounts(self.prompt[rows], self.chosen[rows], self.rejected[rows])

    def row_tokens(self, rows: Rows) -> Rows:
        """Lengths of the rows `[prompt | chosen | rejected]`."""
        tokens: Rows = self.prompt[rows] + self.chosen[rows] + self.rejected[rows]
        return tokens


def to_batch(pairs: Sequence[EncodedPair]) -> pa.RecordBatch:
    """Pairs as a record batch; a field that is missing or misspelt is an error, not a null."""
    columns = [[getattr(pair, name) for pair in pairs] for name in ENCODED_SCHEMA.names]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, ENCODED_SCHEMA, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=ENCODED_SCHEMA)
    batch.validate(full=True)
    for column, field in zip(batch.columns, ENCODED_SCHEMA, strict=True):
        assert column.null_count == 0, f"{field.name} is null"
    return batch


def from_batch(batch: pa.RecordBatch | pa.Table) -> list[EncodedPair]:
    """The pairs of a record batch or table with ENCODED_SCHEMA's columns, and REFERENCE_COLUMNS where it has them."""
    rows = batch.select(ENCODED_SCHEMA.names).to_pylist()
    if not set(REFERENCE_COLUMNS) <= set(batch.schema.names):
        return [EncodedPair(**row) for row in rows]
    references = zip(*(batch[column].to_pylist() for column in REFERENCE_COLUMNS), strict=True)
    return [EncodedPair(**row, reference=ReferenceLogps(*logps)) for row, logps in zip(rows, references, strict=True)]


def write_shard(store: Store, pairs: Sequence[EncodedPair]) -> None:
    """Writes pairs as one shard; its index lines come from `index_lines`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, ENCODED_SCHEMA) as writer:
        for pair in pairs:
            writer.write_batch(to_batch([pair]))
    store.write_bytes(sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class PreparedData:
    """A complete encoded data set. Pickles as its location; opens files only where it is read. `reference` names the folder
    beside the shards whose log-probabilities are read along with the pairs."""

    store: Store
    attempt: str
    num_rows: int
    reference: str | None = None

    @classmethod
    def find(cls, store: Store) -> "PreparedData | None":
        """The data set of a cache folder; None where there is none or only the remains of an unfinished one."""
        manifest = store / "manifest.json"
        if not manifest.exists():
            return None
        content = manifest.read_json()
        return cls(store, content["attempt"], content["num_rows"])

    @classmethod
    def finish(cls, store: Store, *, attempt: str, index: pa.Table, dropped: Sequence[Mapping[str, Any]]) -> "PreparedData":
        """Completes a data set whose shards stand under `attempt`: writes the index, the dropped records, then the manifest."""
        index = index.cast(INDEX_SCHEMA).sort_by([(name, "ascending") for name in ("dataset", "file", "source_row")])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            writer.write_table(index)
        (store / attempt / "index.arrow").write_bytes(sink.getvalue().to_pybytes())
        (store / attempt / "dropped.json").write_json(list(dropped))
        (store / "manifest.json").write_json({"attempt": attempt, "num_rows": index.num_rows, "num_dropped": len(dropped)})
        return cls(store, attempt, index.num_rows)

    @property
    def folder(self) -> Store:
        return self.store / self.attempt

    def index(self) -> pa.Table:
        """INDEX_SCHEMA, sorted by source: the order that row numbers count in."""
        return pa.ipc.open_file(pa.py_buffer((self.folder / "index.arrow").read_bytes())).read_all()

    def dropped(self) -> list[dict[str, Any]]:
        """The records left out, each with dataset, row, reason and detail."""
        dropped: list[dict[str, Any]] = (self.folder / "dropped.json").read_json()
        return dropped

    def token_counts(self) -> TokenCounts:
        index = self.index()
        columns = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
        return TokenCounts(*(index[name].to_numpy().astype(np.int64) for name in columns))

    def reader(self) -> "PairReader":
        return PairReader(self)


class PairReader:
    """Fetches pairs by row number; keeps the most recently used shards open."""

    def __init__(self, data: PreparedData) -> None:
        index = data.index()
        self._folder = data.folder
        self._shards = index["shard"].to_pylist()
        self._positions = index["position"].to_numpy()
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._reference = ReferenceReader(data.folder / data.reference) if data.reference else None

    def read(self, rows: Rows | Sequence[int]) -> pa.Table:
        """The pairs with these row numbers, in this order, as a table of ENCODED_SCHEMA, and of REFERENCE_COLUMNS where there
        is a reference."""
        batches = [self._open(self._shards[row]).get_batch(int(self._positions[row])) for row in rows]
        table = pa.Table.from_batches(batches, schema=ENCODED_SCHEMA)
        if self._reference is None:
            return table
        logps = self._reference.read(rows, table["id"].to_pylist())
        for side, column in zip(SIDES, REFERENCE_COLUMNS, strict=True):
            field = REFERENCE_SCHEMA.field(STORED_NAMES[side])
            table = table.append_column(field.with_name(column), logps[field.name])
        return table

    def _open_shard(self, name: str) -> Any:
        return pa.ipc.open_file((self._folder / name).open_file())
