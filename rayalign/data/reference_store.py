"""Log-probabilities under the reference as data: the files that hold them beside the encoded pairs, in a folder named by what
they depend on (`reference.key`).

Stored for each response token, since algorithms weigh tokens differently. A shard holds SHARD_ROWS rows and is complete or
absent, so that a pass that was cut short goes on with the shards that are missing. `reference.precompute` writes them, `store`
reads them along with the pairs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayalign.storage import Store

SHARD_ROWS = 64
"""Rows of one shard, which one task computes."""

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

OPEN_SHARDS = 64


@dataclass(frozen=True)
class ReferenceLogps:
    """A pair's log-probabilities under the reference, one for each token; see REFERENCE_SCHEMA."""

    chosen: list[float]
    rejected: list[float]
    companion: list[float]


def write_reference_shard(store: Store, ids: Sequence[str], rows: Sequence[ReferenceLogps]) -> None:
    """Writes the rows of one shard, a record batch for each, so that a row is one small read."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, REFERENCE_SCHEMA) as writer:
        for pair_id, row in zip(ids, rows, strict=True):
            columns = [pa.array([pair_id]), *(pa.array([getattr(row, side)], pa.list_(pa.float32())) for side in SIDES)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=REFERENCE_SCHEMA))
    store.write_bytes(sink.getvalue().to_pybytes())


def shard_name(shard: int) -> str:
    """The file of the rows SHARD_ROWS * shard and on."""
    return f"part_{shard:06d}.arrow"


def missing_shards(folder: Store, rows: NDArray[np.int64]) -> list[int]:
    """The shards that hold some of `rows` and are not there yet."""
    there = {file.name for file in folder.list()}
    return [shard for shard in np.unique(rows // SHARD_ROWS).tolist() if shard_name(shard) not in there]


class ReferenceReader:
    """Fetches rows by their number; keeps the most recently used shards open."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def read(self, rows: Sequence[int] | NDArray[np.int64], ids: Sequence[str]) -> pa.Table:
        """The rows with these numbers, in this order, as a table of REFERENCE_SCHEMA; `ids` are the pairs' they must have."""
        batches = [self._open(int(row) // SHARD_ROWS).get_batch(int(row) % SHARD_ROWS) for row in rows]
        table = pa.Table.from_batches(batches, schema=REFERENCE_SCHEMA)
        stored = table["id"].to_pylist()
        assert stored == list(ids), f"{self._folder.location} holds the log-probs of {stored} where {list(ids)} stand"
        return table

    def _open_shard(self, shard: int) -> Any:
        return pa.ipc.open_file((self._folder / shard_name(shard)).open_file())
