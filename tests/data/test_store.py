import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

import rayalign.data.store
from rayalign.data.store import ENCODED_SCHEMA, INDEX_SCHEMA, EncodedPair, PreparedData, from_batch, to_batch, write_shard
from rayalign.storage import Store

PAIRS = [
    EncodedPair("a", [1, 2, 3], [4], [5, 6], [b"\x89PNG\x00", b""], ["h1", "h2"], margin=0.25),
    EncodedPair("b", [7], [8, 9], [], [], []),
    EncodedPair("c", list(range(600)), [2], [2, 2], [bytes(range(256)) * 50], ["h3"], margin=-1.0),
    EncodedPair("ümlaut 猫", [1], [1], [1], [], []),
    EncodedPair("e", [9], [9], [9], [], []),
]
# Row: (dataset, file, source_row) of its source, and the shard and position where a worker wrote it. Written in any order.
PLACES = {
    "b": (0, 0, 4, "shard_1", 0),
    "a": (0, 0, 11, "shard_0", 0),
    "c": (0, 1, 0, "shard_0", 1),
    "e": (1, 0, 0, "shard_0", 2),
    "ümlaut 猫": (1, 0, 3, "shard_1", 1),
}
IN_SOURCE_ORDER = list(PLACES)
DROPPED = [{"dataset": "d", "row": 3, "reason": "too long", "detail": "3000 tokens"}]


def index_of(ids: list[str]) -> pa.Table:
    pairs = {pair.id: pair for pair in PAIRS}
    lines = []
    for pair_id in ids:
        place = dict(zip(("dataset", "file", "source_row", "shard", "position"), PLACES[pair_id], strict=True))
        pair = pairs[pair_id]
        counts = {f"{part}_tokens": len(vars(pair)[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
        lines.append({"id": pair_id, **place, **counts})
    return pa.Table.from_pylist(lines, schema=INDEX_SCHEMA)


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    store = Store(str(tmp_path / "cache"))
    for shard in ("shard_0", "shard_1"):
        inside = sorted((p for p in PAIRS if PLACES[p.id][3] == shard), key=lambda p: PLACES[p.id][4])
        write_shard(store / "attempt" / shard, inside)
    return PreparedData.finish(store, attempt="attempt", index=index_of([p.id for p in PAIRS]), dropped=DROPPED)


def test_pairs_come_back_as_they_were_written(data: PreparedData) -> None:
    pairs = {pair.id: pair for pair in PAIRS}
    assert from_batch(data.reader().read(range(5))) == [pairs[pair_id] for pair_id in IN_SOURCE_ORDER]


@pytest.mark.parametrize("rows", [[3], [4, 0, 2], [1, 1, 1], [4, 3, 2, 1, 0], []])
def test_rows_can_be_looked_up_in_any_order(data: PreparedData, rows: list[int]) -> None:
    table = data.reader().read(rows)
    assert table.schema == ENCODED_SCHEMA
    assert [pair.id for pair in from_batch(table)] == [IN_SOURCE_ORDER[row] for row in rows]


def test_a_fetch_works_with_fewer_open_shards_than_there_are(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayalign.data.store, "OPEN_SHARDS", 1)
    rows = [0, 1, 0, 4, 2]
    assert [pair.id for pair in from_batch(data.reader().read(rows))] == [IN_SOURCE_ORDER[row] for row in rows]


def test_the_index_is_sorted_by_source_whatever_order_it_was_gathered_in(data: PreparedData) -> None:
    assert data.index()["id"].to_pylist() == IN_SOURCE_ORDER
    before, gathered = data.index(), index_of(["e", "a", "ümlaut 猫", "c", "b"])
    assert PreparedData.finish(data.store, attempt="attempt", index=gathered, dropped=[]).index().equals(before)


def test_token_counts_are_those_of_the_rows(data: PreparedData) -> None:
    token_counts = data.token_counts()
    assert token_counts.num_rows == data.num_rows == 5
    assert token_counts.prompt.tolist() == [1, 3, 600, 1, 1]
    assert token_counts.chosen.tolist() == [2, 1, 1, 1, 1]
    assert token_counts.rejected.tolist() == [0, 2, 2, 1, 1]
    assert token_counts.row_tokens(token_counts.chosen - 1).tolist() == [6, 3, 3, 3, 3]  # rows 1, 0, 0, 0, 0
    assert [pair.num_tokens for pair in from_batch(data.reader().read(range(5)))] == [3, 6, 603, 3, 3]


def test_dropped_records_come_back_with_their_reasons(data: PreparedData) -> None:
    assert data.dropped() == DROPPED


def test_a_finished_data_set_is_found_again_and_pickles_by_its_place(data: PreparedData) -> None:
    assert PreparedData.find(data.store) == data
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data
    assert from_batch(copy.reader().read([1]))[0].id == "a"


def test_a_folder_without_a_manifest_does_not_count(data: PreparedData) -> None:
    (data.store / "manifest.json").delete()
    assert PreparedData.find(data.store) is None
    assert PreparedData.find(data.store / "nowhere") is None


def test_the_manifest_is_written_last(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = Store.write_bytes

    def note(store: Store, content: bytes) -> None:
        written.append(store.name)
        original(store, content)

    monkeypatch.setattr(Store, "write_bytes", note)
    PreparedData.finish(data.store, attempt="attempt", index=data.index(), dropped=[])
    assert written == ["index.arrow", "dropped.json", "manifest.json"]


def test_an_unfinished_second_attempt_leaves_the_finished_one_in_place(data: PreparedData) -> None:
    write_shard(data.store / "second" / "shard_0", PAIRS[:1])
    found = PreparedData.find(data.store)
    assert found is not None
    assert found.attempt == "attempt"
    assert json.loads((data.store / "manifest.json").read_bytes()) == {"attempt": "attempt", "num_rows": 5, "num_dropped": 1}


@pytest.mark.parametrize("missing", ENCODED_SCHEMA.names)
def test_a_missing_or_misspelt_field_is_an_error_and_not_a_null(missing: str) -> None:
    values = dataclasses.asdict(PAIRS[0])
    values[f"{missing}_"] = values.pop(missing)
    with pytest.raises(AttributeError, match=missing):
        to_batch([SimpleNamespace(**values)])
    table = pa.Table.from_batches([to_batch(PAIRS)])
    with pytest.raises(KeyError, match=missing):
        from_batch(table.rename_columns([f"{name}_" if name == missing else name for name in table.column_names]))


def test_a_shard_holds_one_record_batch_for_each_pair(data: PreparedData) -> None:
    file = pa.ipc.open_file(pa.py_buffer((data.folder / "shard_0").read_bytes()))
    assert file.num_record_batches == 3
    assert [from_batch(file.get_batch(i))[0].id for i in range(3)] == ["a", "c", "e"]


def test_an_index_with_other_columns_is_refused(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"):
        PreparedData.finish(Store(str(tmp_path / "new")), attempt="x", index=data.index().drop_columns(["shard"]), dropped=[])


def test_a_data_set_that_lacks_one_of_its_shards_is_never_complete(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_shard(store / "one" / "shard_1", [PAIRS[1]])
    with pytest.raises(ValueError) as caught:
        PreparedData.finish(store, attempt="one", index=index_of(IN_SOURCE_ORDER), dropped=[])
    assert str(caught.value) == (
        f"{tmp_path}/one: lacks 1 of the shards that were written there, such as shard_0. Do all nodes see the same folder? "
        "Give a --cache_dir on a file system that all of them mount, or a URL."
    )
    assert PreparedData.find(store) is None
