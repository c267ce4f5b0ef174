"""Shards of the reference's log-probs, as they lie on storage."""

import random
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayalign.data.checked import NOTES, DamagedFile, require_undamaged
from rayalign.data.reference_store import (
    CRC_OF_CHECKED,
    ReferenceLogps,
    ReferenceReader,
    folder_name,
    forget_damage,
    head_bytes,
    missing_shards,
    shard_name,
    write_reference_shard,
)
from rayalign.storage import Store

LOGPS = pa.list_(pa.float32())
COLUMNS = {"id": pa.string(), "chosen": LOGPS, "rejected": LOGPS, "damaged": LOGPS}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])

IDS = [f"row {i}" for i in range(70)]
ROWS = [ReferenceLogps([-i - 0.5] * (i % 5), [-i - 0.25] * (i % 3), [-float(i)] * (i % 2)) for i in range(70)]
"""Of two shards, the second of which is not full."""

FIRST, SECOND = shard_name(0), shard_name(1)


def written(folder: Store) -> Store:
    for shard in (0, 1):
        span = slice(64 * shard, 64 * shard + 64)
        write_reference_shard(folder / shard_name(shard), IDS[span], ROWS[span])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return written(Store(str(tmp_path / "key" / "attempt" / "reference")))


def read(folder: Store, rows: Sequence[int] = range(70)) -> list[dict[str, object]]:
    reader = ReferenceReader(folder)
    return [reader.read_row(row).to_pylist()[0] for row in rows]


def test_log_probs_come_back_as_they_were_written_in_any_order(folder: Store) -> None:
    expected = [
        {"id": i, "chosen": r.chosen, "rejected": r.rejected, "damaged": r.companion} for i, r in zip(IDS, ROWS, strict=True)
    ]
    assert read(folder) == expected
    order = [69, 0, 64, 63, 0]
    assert read(folder, order) == [expected[row] for row in order]
    assert ReferenceReader(folder).read_row(0).schema == SCHEMA


def test_a_shard_is_an_arrow_file_behind_a_head_with_a_record_batch_for_each_row(folder: Store) -> None:
    content = (folder / SECOND).read_bytes()
    file = pa.ipc.open_file(pa.py_buffer(content[head_bytes(folder) :]))
    assert file.schema == SCHEMA
    assert file.num_record_batches == 6
    assert file.read_all().to_pylist() == read(folder)[64:]


def test_the_checksum_of_what_ends_with_its_checksum_is_always_the_same() -> None:
    draw = random.Random(0)
    for size in (0, 1, 772):
        content, before = draw.randbytes(size), draw.randrange(2**32)
        assert zlib.crc32(content + zlib.crc32(content, before).to_bytes(4, "little"), before) == CRC_OF_CHECKED


def test_a_data_set_that_was_moved_with_its_folder_is_read(folder: Store, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "key", tmp_path / "elsewhere" / "key")
    assert read(Store(str(tmp_path / "elsewhere" / "key" / "attempt" / "reference"))) == read(folder)


def test_shards_that_are_not_there_or_have_no_whole_head_are_missing(folder: Store) -> None:
    rows = np.array([0, 63, 64, 128])
    assert missing_shards(folder, rows) == [2]
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[: head_bytes(folder)])
    assert missing_shards(folder, rows) == [1, 2]
    (folder / FIRST).delete()
    assert missing_shards(folder, rows) == [0, 1, 2]
    assert missing_shards(folder / "nowhere", rows) == [0, 1, 2]


DAMAGES: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(file.read_bytes()[:-2000]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
    lambda file: file.write_bytes(b"ARROW1" * 10_000),
    Path.unlink,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_ends_at_a_damaged_shard_and_the_next_start_computes_it_again(
    folder: Store, damage: Callable[[Path], object]
) -> None:
    right, file = read(folder), Path(folder.location) / FIRST
    damage(file)
    with pytest.raises(DamagedFile) as caught:
        read(folder)
    assert str(caught.value).startswith(f"{file} is ")
    assert str(caught.value).endswith(" The same command makes it anew.")
    assert read(folder, range(64, 70)) == right[64:]
    assert missing_shards(folder, np.arange(70)) == [0]
    assert missing_shards(folder, np.array([69])) == [0]  # also by a run that needs only others
    with pytest.raises(DamagedFile, match=FIRST):
        require_undamaged(folder)
    written(folder)
    forget_damage(folder, [0])
    require_undamaged(folder)
    assert missing_shards(folder, np.arange(70)) == []
    assert read(folder) == right


def test_a_flipped_bit_never_gives_other_log_probs(folder: Store) -> None:
    right, draw = read(folder), random.Random(0)
    file = Path(folder.location) / FIRST
    content, named = file.read_bytes(), 0
    for _ in range(1000):
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            rows = read(folder)
        except DamagedFile:
            named += 1
            (folder / NOTES).delete()
        else:
            assert rows == right
    assert named > 800  # the other places are those that only other programs read


@pytest.mark.parametrize("other", ["key/attempt/other", "key/other/reference", "other/attempt/reference"])
def test_a_shard_of_another_reference_data_set_or_attempt_is_not_taken_for_this_one_s(
    folder: Store, tmp_path: Path, other: str
) -> None:
    """The same rows by another model: nothing but the place tells them apart."""
    shutil.copy(tmp_path / "key/attempt/reference" / FIRST, tmp_path / FIRST)
    theirs = written(Store(str(tmp_path / other)))
    shutil.copy(tmp_path / FIRST, Path(theirs.location) / FIRST)
    with pytest.raises(DamagedFile, match=FIRST):
        read(theirs)


def test_the_next_shard_under_the_name_of_this_one_is_not_taken_for_it(folder: Store) -> None:
    shutil.copy(Path(folder.location) / SECOND, Path(folder.location) / FIRST)
    with pytest.raises(DamagedFile, match=FIRST):
        read(folder, range(1))


def test_a_large_data_set_has_larger_shards_in_a_folder_that_says_so(tmp_path: Path) -> None:
    data = Store(str(tmp_path / "attempt"))
    assert folder_name("reference_k", data, 640_000) == "reference_k"
    assert [folder_name("reference_k", data, rows) for rows in (640_001, 1_280_001, 10_000_000)] == [
        "reference_k_by_128",
        "reference_k_by_256",
        "reference_k_by_1024",
    ]
    folder = data / "reference_k_by_128"
    write_reference_shard(folder / FIRST, IDS, ROWS)
    assert missing_shards(folder, np.arange(300)) == [1, 2]
    assert [line["chosen"] for line in read(folder)] == [row.chosen for row in ROWS]


def test_a_pass_over_a_large_data_set_that_began_with_small_shards_goes_on_with_them(tmp_path: Path) -> None:
    data = Store(str(tmp_path / "attempt"))
    write_reference_shard(data / "reference_k" / FIRST, IDS[:64], ROWS[:64])
    assert folder_name("reference_k", data, 10_000_000) == "reference_k"
