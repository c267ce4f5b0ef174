import dataclasses
import itertools
import json
import logging
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

import rayalign.data.checked
import rayalign.data.shards
from rayalign.data.checked import NOTES, CheckedFile, DamagedFile, Place
from rayalign.data.index import INDEX_SCHEMA, write_index
from rayalign.data.pairs import ENCODED_SCHEMA, EncodedPair, from_batch, to_batch
from rayalign.data.shards import STORED_SCHEMA, TAIL, ShardWriter, shard_name, write_shard
from rayalign.data.store import PreparedData
from rayalign.storage import Store

PAIRS = [
    EncodedPair("a", [1, 2, 3], [4], [5, 6], [b"\x89PNG\x00", b""], ["h1", "h2"], margin=0.25),
    EncodedPair("b", [7], [8, 9], [], [], []),
    EncodedPair("c", list(range(600)), [2], [2, 2], [bytes(range(256)) * 50], ["h3"], margin=-1.0),
    EncodedPair("ümlaut 猫", [1], [1], [1], [], []),
    EncodedPair("e", [9], [9], [9], [], []),
]
# Row: (dataset, file, source_row) of its source, and the shard where a worker wrote it, in this order. Written in any order.
PLACES = {
    "b": (0, 0, 4, 1),
    "a": (0, 0, 11, 0),
    "c": (0, 1, 0, 0),
    "e": (1, 0, 0, 0),
    "ümlaut 猫": (1, 0, 3, 1),
}
IN_SOURCE_ORDER = list(PLACES)
DROPPED = [{"dataset": "d", "row": 3, "reason": "too long", "detail": "3000 tokens"}]


def write_shards(folder: Store, shards: tuple[int, ...] = (0, 1), pairs: list[EncodedPair] = PAIRS) -> pa.Table:
    """Writes shards and returns the lines of the index for them, in order."""
    lines = []
    for shard in shards:
        inside = sorted(
            (pair for pair in pairs if PLACES[pair.id][3] == shard), key=lambda pair: IN_SOURCE_ORDER.index(pair.id)
        )
        for pair, place in zip(inside, write_shard(folder / shard_name(shard), inside), strict=True):
            source = dict(zip(("dataset", "file", "source_row", "shard"), PLACES[pair.id], strict=True))
            counts = {f"{part}_tokens": len(vars(pair)[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
            lines.append({"id": pair.id, **source, **place._asdict(), **counts})
    lines.sort(key=lambda line: (line["dataset"], line["file"], line["source_row"]))
    return pa.Table.from_pylist(lines, schema=INDEX_SCHEMA)


def finish(store: Store, attempt: str, lines: list[dict[str, object]] | pa.Table, **others: Any) -> PreparedData:
    """Completes a data set whose shards are written; `lines` are the index's."""
    table = lines if isinstance(lines, pa.Table) else pa.Table.from_pylist(lines, INDEX_SCHEMA)
    return PreparedData.finish(store, attempt=attempt, index=write_index(store / attempt, [table]), **{"dropped": [], **others})


def finished(store: Store, pairs: list[EncodedPair] = PAIRS) -> PreparedData:
    index = write_shards(store / "attempt", pairs=pairs)
    return finish(store, "attempt", index, dropped=DROPPED, remarks=[(logging.INFO, "words")])


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    return finished(Store(str(tmp_path / "cache")))


def test_pairs_come_back_as_they_were_written(data: PreparedData) -> None:
    pairs = {pair.id: pair for pair in PAIRS}
    assert from_batch(data.reader().read(range(5))) == [pairs[pair_id] for pair_id in IN_SOURCE_ORDER]


@pytest.mark.parametrize("rows", [[3], [4, 0, 2], [1, 1, 1], [4, 3, 2, 1, 0], []])
def test_rows_can_be_looked_up_in_any_order(data: PreparedData, rows: list[int]) -> None:
    table = data.reader().read(rows)
    assert table.schema == ENCODED_SCHEMA
    assert [pair.id for pair in from_batch(table)] == [IN_SOURCE_ORDER[row] for row in rows]


def test_a_fetch_works_with_fewer_open_shards_than_there_are(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayalign.data.checked, "OPEN_FILES", 1)
    rows = [0, 1, 0, 4, 2]
    assert [pair.id for pair in from_batch(data.reader().read(rows))] == [IN_SOURCE_ORDER[row] for row in rows]


def test_rows_are_numbered_in_the_order_of_the_sources(data: PreparedData) -> None:
    assert data.index()["id"].to_pylist() == IN_SOURCE_ORDER
    assert data.rows_of(frozenset(["e", "a", "nowhere"])) == {"a": 1, "e": 3}
    assert data.rows_of(frozenset()) == {}


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
    assert data.remarks() == [(logging.INFO, "words")]


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
    finish(data.store, "attempt", data.index())
    assert written == ["dropped.json", "remarks.json", "manifest.json"]


def test_an_unfinished_second_attempt_leaves_the_finished_one_in_place(data: PreparedData) -> None:
    write_shard(data.store / "second" / shard_name(0), PAIRS[:1])
    assert PreparedData.find(data.store) == data
    manifest = json.loads((data.store / "manifest.json").read_bytes())
    assert (manifest["key"], manifest["attempt"], manifest["num_rows"]) == ("cache", "attempt", 5)
    assert sorted(manifest["sha256"]) == ["dropped.json", "index.arrow", "remarks.json"]


@pytest.mark.parametrize("missing", ENCODED_SCHEMA.names)
def test_a_missing_or_misspelt_field_is_an_error_and_not_a_null(missing: str) -> None:
    values = dataclasses.asdict(PAIRS[0])
    values[f"{missing}_"] = values.pop(missing)
    with pytest.raises(AttributeError, match=missing):
        to_batch([SimpleNamespace(**values)])
    table = pa.Table.from_batches([to_batch(PAIRS)])
    with pytest.raises(KeyError, match=missing):
        from_batch(table.rename_columns([f"{name}_" if name == missing else name for name in table.column_names]))


def stored(content: bytes, place: Place) -> dict[str, object]:
    """A pair's row of STORED_SCHEMA in a shard's content."""
    end = place.start + place.size - TAIL
    size = int.from_bytes(content[end : end + TAIL], "little")
    (row,) = pa.ipc.read_record_batch(pa.py_buffer(content[end - size : end]), STORED_SCHEMA).to_pylist()
    return row


def test_a_shard_holds_each_picture_once_before_the_first_pair_that_shows_it(tmp_path: Path) -> None:
    one, two, three = b"1" * 1000, b"2" * 2000, b"3" * 500
    pairs = [
        EncodedPair("a", [1], [1], [1], [one, two], ["h1", "h2"]),
        EncodedPair("b", [1], [1], [1], [two], ["h2"]),
        EncodedPair("c", [1], [1], [1], [one, three, one], ["h1", "h3", "h1"]),
    ]
    places = write_shard(Store(str(tmp_path / "shard")), pairs)
    content = (tmp_path / "shard").read_bytes()
    assert [content.count(picture) for picture in (one, two, three)] == [1, 1, 1]
    assert content.startswith(one + two)
    assert content[places[2].start :].startswith(three)
    assert [place.start for place in places[1:]] + [len(content)] == [place.start + place.size for place in places]
    rows = [stored(content, place) for place in places]
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [[content[at["start"] :][: at["size"]] for at in row["pictures"]] for row in rows] == [p.images for p in pairs]


def test_a_pair_is_one_read_and_one_more_for_each_picture_of_an_earlier_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = b"1" * 1000, b"2" * 2000
    store = Store(str(tmp_path))
    writer = ShardWriter(store / "one", itertools.count())
    pairs = [
        EncodedPair("a", [1], [1], [1], [one, two], ["h1", "h2"]),
        EncodedPair("b", [1], [1], [1], [two, b"3"], ["h2", "h3"]),
        EncodedPair("c", [1], [1], [1], [], []),
    ]
    for pair in pairs:
        writer.add(pair)
    columns = {"dataset": 0, "file": 0, "prompt_tokens": 1, "chosen_tokens": 1, "rejected_tokens": 1}
    index = [{"id": str(row), "source_row": row, **columns, **line} for row, line in enumerate(writer.finish())]
    data = finish(store, "one", index)
    read, reads = CheckedFile.read, []
    monkeypatch.setattr(CheckedFile, "read", lambda file, place, **options: reads.append(place) or read(file, place, **options))
    reader, counts = data.reader(), []
    for row, pair in enumerate(pairs):
        reads.clear()
        assert from_batch(reader.read([row])) == [pair]
        counts.append(len(reads))
    assert counts == [1, 2, 1]


def test_a_task_begins_another_shard_where_one_is_full_and_counts_pictures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rayalign.data.shards, "SHARD_BYTES", 2500)
    store = Store(str(tmp_path / "cache"))
    writer = ShardWriter(store / "one", itertools.count(3, 10))
    hashes = ["h1", "h1", "h1", "h2", "h2", "h3", "h1"]  # two distinct ones are within the bytes, with the third it is full
    for number, digest in enumerate(hashes):
        writer.add(EncodedPair(str(number), [1], [1], [1], [digest.encode() * 500], [digest]))
    lines = writer.finish()
    assert [line["shard"] for line in lines] == [3, 3, 3, 3, 3, 3, 13]
    assert [file.name for file in (store / "one").list()] == ["shard_000003.arrow", "shard_000013.arrow"]
    columns = {"dataset": 0, "file": 0, "prompt_tokens": 1, "chosen_tokens": 1, "rejected_tokens": 1}
    index = [{"id": str(row), "source_row": row, **columns, **line} for row, line in enumerate(lines)]
    data = finish(store, "one", index)
    assert [pair.images for pair in from_batch(data.reader().read(range(7)))] == [[h.encode() * 500] for h in hashes]
    assert data.shards() == [3, 13]


def test_an_index_with_other_columns_is_refused(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"):
        write_index(Store(str(tmp_path / "new")), [data.index().drop_columns(["shard"])])
    assert not list((tmp_path / "new").iterdir())


def test_a_data_set_that_lacks_one_of_its_shards_is_never_complete(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    index = write_shards(store / "one", (0, 1))
    (tmp_path / "one" / shard_name(0)).unlink()
    with pytest.raises(ValueError) as caught:
        finish(store, "one", index)
    assert str(caught.value) == (
        f"{tmp_path}/one: lacks 1 of the shards that were written there, such as {shard_name(0)}. Do all nodes see the same "
        "folder? Give a --cache_dir on a file system that all of them mount, or a URL."
    )
    assert PreparedData.find(store) is None


def test_places_and_checksums_of_pairs_stay_what_they_are(tmp_path: Path) -> None:
    """A change here makes what is cached unreadable: it needs another CACHE_VERSION."""
    pairs = [
        EncodedPair("a", [1, 2, 3], [4], [5, 6], [b"\x89PNG"], ["h1"], margin=0.25),
        EncodedPair("b", [7], [8], [], [], []),
    ]
    places = write_shard(Store(str(tmp_path / "shard")), pairs)
    content = (tmp_path / "shard").read_bytes()
    rows = [stored(content, place) for place in places]
    assert [row.pop("pictures") for row in rows] == [[{"start": 0, "size": 4, "checksum": zlib.crc32(b"\x89PNG")}], []]
    assert [EncodedPair(**row, images=pair.images) for row, pair in zip(rows, pairs, strict=True)] == pairs
    assert [place.checksum for place in places] == [zlib.crc32(content[p.start : p.start + p.size]) for p in places]


Damage = Callable[[Path], None]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def text(file: Path) -> None:
    file.write_text("<html>502 Bad Gateway</html>" * 1000)


DAMAGES: list[Damage] = [cut, empty, zeros, text, Path.unlink]


def read_all(data: PreparedData) -> list[EncodedPair]:
    return from_batch(data.reader().read(range(data.num_rows)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_ends_at_a_damaged_shard_and_names_it_for_the_next_start(data: PreparedData, damage: Damage) -> None:
    file = Path(data.folder.location) / shard_name(0)
    good = data.reader().read([0])
    damage(file)
    with pytest.raises(DamagedFile) as caught:
        read_all(data)
    assert str(caught.value).startswith(f"{file} is ")
    assert str(caught.value).endswith(" The same command makes it anew.")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert data.reader().read([0]) == good  # of the other shard
    found = PreparedData.find(data.store)
    assert found == data
    assert found.damaged_shards() == [0]
    with pytest.raises(DamagedFile, match=rf"{shard_name(0)} is .*\. The same command makes it anew\.$"):
        data.require_undamaged()


def test_shards_that_are_missing_or_too_short_are_seen_before_they_are_read(data: PreparedData) -> None:
    folder = Path(data.folder.location)
    assert data.damaged_shards() == []
    cut(folder / shard_name(0))
    assert data.damaged_shards() == [0]
    (folder / shard_name(1)).unlink()
    assert data.damaged_shards() == [0, 1]


def test_damaged_shards_are_put_back_where_their_pairs_are_the_same(data: PreparedData, tmp_path: Path) -> None:
    before = read_all(data)
    cut(Path(data.folder.location) / shard_name(1))
    with pytest.raises(DamagedFile):
        read_all(data)
    repairs = Store(str(tmp_path / "repairs"))
    index = write_shards(repairs, (1,))
    assert data.mend([1], repairs, index)
    assert data.damaged_shards() == []
    data.require_undamaged()
    assert read_all(data) == before
    assert not list((Path(data.folder.location) / NOTES).iterdir())


def test_other_pairs_are_not_put_in_the_place_of_a_damaged_shard(data: PreparedData, tmp_path: Path) -> None:
    file = Path(data.folder.location) / shard_name(1)
    cut(file)
    content = file.read_bytes()
    changed = [
        dataclasses.replace(pair, images=[b"another picture"], image_hashes=["h9"]) if pair.id == "b" else pair
        for pair in PAIRS
    ]
    repairs = Store(str(tmp_path / "repairs"))
    for pairs in (changed, [pair for pair in PAIRS if pair.id != "b"]):
        assert not data.mend([1], repairs, write_shards(repairs, (1,), pairs))
    assert file.read_bytes() == content


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "attempt/index.arrow", "attempt/dropped.json", "attempt/remarks.json"])
def test_what_lists_the_shards_is_made_anew_as_a_whole(
    data: PreparedData, caplog: pytest.LogCaptureFixture, name: str, damage: Damage
) -> None:
    file = Path(data.store.location) / name
    damage(file)
    assert PreparedData.find(data.store) is None
    if name == "manifest.json" and damage is Path.unlink:
        assert not caplog.records  # as before the first run
        return
    (line,) = caplog.messages
    assert line.startswith(f"Data: encoding anew what was encoded before: {file} ")


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "null", "1", '"text"', "[" * 100_000, '{"attempt": "attempt"}', '{"attempt": "attempt", "num_rows": 5}'),
        '{"attempt": "attempt", "num_rows": 5, "num_dropped": 1}',  # as version 2 of the cache wrote it
        *(
            '{{"key": "cache", "attempt": {}, "num_rows": {}, "sha256": {}}}'.format(*values)
            for values in (
                ('"../attempt"', 5, '{"index.arrow": "", "dropped.json": "", "remarks.json": ""}'),
                ('"attempt"', '"5"', '{"index.arrow": "", "dropped.json": "", "remarks.json": ""}'),
                ('"attempt"', 5, '["index.arrow", "dropped.json", "remarks.json"]'),
                ('"attempt"', 5, '{"index.arrow": 1, "dropped.json": 2, "remarks.json": []}'),
            )
        ),
    ],
)
def test_a_manifest_of_other_content_counts_as_none(data: PreparedData, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (data.store / "manifest.json").write_bytes(content.encode())
    assert PreparedData.find(data.store) is None
    assert len(caplog.records) == 1


def test_a_flipped_bit_never_gives_other_pairs(data: PreparedData, caplog: pytest.LogCaptureFixture) -> None:
    """A bit at each of 300 seeded places in every file: the same pairs, or an end that names a file, or everything is anew."""
    right, counts = read_all(data), data.token_counts().prompt.tolist()
    draw = random.Random(0)
    ends = {"same": 0, "named": 0, "anew": 0}
    files = [file for file in sorted(Path(data.store.location).rglob("*")) if file.is_file()]
    assert len(files) == 6
    for file in files:
        content = file.read_bytes()
        for _ in range(300):
            place, bit = draw.randrange(len(content)), draw.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            found = PreparedData.find(data.store)
            if found is None:
                ends["anew"] += 1
                continue
            assert (found.dropped(), found.remarks()) == (DROPPED, [(logging.INFO, "words")])
            assert found.token_counts().prompt.tolist() == counts
            try:
                pairs = read_all(found)
            except DamagedFile:
                ends["named"] += 1
                assert [note.name for note in (found.folder / NOTES).list()] == [file.name]
                (found.folder / NOTES).delete()
            else:
                ends["same"] += 1
                assert pairs == right
        file.write_bytes(content)
    assert ends["anew"] > 1000  # of four files, nearly every bit
    assert ends["named"] > 300  # of two shards, every bit of a pair: the rest are the parts that only other programs read


def test_files_of_another_data_set_are_not_taken_for_this_one_s(data: PreparedData, tmp_path: Path) -> None:
    changed = [dataclasses.replace(pair, chosen_ids=[9] * len(pair.chosen_ids)) for pair in PAIRS]
    other = finished(Store(str(tmp_path / "other")), changed)
    mine, theirs = Path(data.store.location), Path(other.store.location)
    right = read_all(data)
    for name in sorted(str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file()):
        content = (mine / name).read_bytes()
        shutil.copy(theirs / name, mine / name)
        found = PreparedData.find(data.store)
        if found is not None:
            if name.endswith(("dropped.json", "remarks.json")):  # the same in both
                assert read_all(found) == right
            else:
                with pytest.raises(DamagedFile, match=name):
                    read_all(found)
                (found.folder / NOTES).delete()
        (mine / name).write_bytes(content)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)  # the whole data set under another's name
    assert PreparedData.find(data.store) is None


def test_what_was_read_wrong_once_is_read_again(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection or a memory that lost a bit is no damage of the file."""
    right = read_all(data)
    original, opened = Store.open_file, []

    def open_file(store: Store) -> pa.NativeFile:
        opened.append(store.name)
        file = original(store)
        return pa.BufferReader(bytes(file.size())) if opened == [shard_name(1)] else file

    reader = data.reader()
    monkeypatch.setattr(Store, "open_file", open_file)
    assert from_batch(reader.read(range(5))) == right
    assert opened == [shard_name(1), shard_name(1), shard_name(0)]
    data.require_undamaged()


def test_damage_that_cannot_be_marked_is_told_with_what_to_do(data: PreparedData) -> None:
    file = Path(data.folder.location) / shard_name(1)
    cut(file)
    (Path(data.folder.location) / NOTES).write_text("in the way")
    with pytest.raises(DamagedFile) as caught:
        read_all(data)
    assert str(caught.value).startswith(
        f"{file} is damaged: it ends too early. Delete it, then the same command makes it anew (it can't be marked as damaged: "
    )


def test_a_place_is_read_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = CheckedFile(Store(str(tmp_path / "file")))
    (tmp_path / "file").write_bytes(b"0123456789")
    assert file.read(Place(2, 3, zlib.crc32(b"234"))) == b"234"
    for place in (Place(2, 3, 0), Place(8, 5, 0), Place(100, 1, 0)):
        with pytest.raises(DamagedFile):
            file.read(place)
