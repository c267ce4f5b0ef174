"""Shards of the reference's log-probs, as they lie on storage."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from rayalign.data.reference_store import ReferenceLogps, ReferenceReader, missing_shards, shard_name, write_reference_shard
from rayalign.storage import Store

LOGPS = pa.list_(pa.float32())
COLUMNS = {"id": pa.string(), "chosen": LOGPS, "rejected": LOGPS, "damaged": LOGPS}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])
"""What shards were written with since there are any."""


def test_shards_are_written_under_the_names_that_they_always_had(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    rows = [ReferenceLogps([-1.0, -2.0], [-3.0], [-4.0, -5.0]), ReferenceLogps([-6.0], [], [])]
    write_reference_shard(folder / shard_name(1), ["a", "b"], rows)
    with pa.ipc.open_file(str(tmp_path / "part_000001.arrow")) as file:
        assert file.schema == SCHEMA
        assert file.num_record_batches == 2  # a row is one small read
        assert file.read_all().to_pylist() == [
            {"id": "a", "chosen": [-1.0, -2.0], "rejected": [-3.0], "damaged": [-4.0, -5.0]},
            {"id": "b", "chosen": [-6.0], "rejected": [], "damaged": []},
        ]


def test_shards_of_earlier_versions_are_found_and_read(tmp_path: Path) -> None:
    row = {"id": "a", "chosen": [-1.0], "rejected": [-2.0], "damaged": [-3.0]}
    with pa.ipc.new_file(str(tmp_path / "part_000000.arrow"), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
    folder = Store(str(tmp_path))
    assert missing_shards(folder, np.array([0, 63, 64])) == [1]
    assert ReferenceReader(folder).read([0], ["a"]).to_pylist() == [row]
