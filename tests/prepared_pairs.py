"""Prepared data sets of given pairs."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from rayalign.data.index import INDEX_SCHEMA, write_index
from rayalign.data.shards import shard_name, write_shard
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.storage import Store


def prepared(pairs: Sequence[EncodedPair], folder: Path) -> PreparedData:
    """A data set in a folder whose row numbers are the pairs' places."""
    store = Store(str(folder))
    places = write_shard(store / "one" / shard_name(0), pairs)
    lines = [
        {
            "id": pair.id,
            "dataset": 0,
            "file": 0,
            "source_row": row,
            "shard": 0,
            **places[row]._asdict(),
            "prompt_tokens": len(pair.prompt_ids),
            "chosen_tokens": len(pair.chosen_ids),
            "rejected_tokens": len(pair.rejected_ids),
        }
        for row, pair in enumerate(pairs)
    ]
    index = write_index(store / "one", [pa.Table.from_pylist(lines, schema=INDEX_SCHEMA)])
    return PreparedData.finish(store, attempt="one", index=index, dropped=[])
