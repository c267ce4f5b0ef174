"""The index as it lies on storage, and the file of its numbers that each node makes."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayalign.data import index
from rayalign.data.checked import DamagedFile
from rayalign.data.index import INDEX_SCHEMA, NUMBERS, NoRoom, check_index, numbers_of, opened_index, write_index
from rayalign.storage import Store

LINES = pa.table(
    {
        "id": [f"rows.jsonl:{row}" for row in range(10)],
        "dataset": [0] * 6 + [1] * 4,
        "file": [0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
        "source_row": [1, 2, 5, 0, 1, 2, 0, 1, 2, 3],
        "shard": [0, 0, 0, 1, 1, 1, 2, 2, 3, 3],
        "start": [2**40 + row for row in range(10)],
        "size": [2**32 - 1 - row for row in range(10)],
        "checksum": [2**31 + row for row in range(10)],
        "prompt_tokens": range(10),
        "chosen_tokens": range(10, 20),
        "rejected_tokens": range(20, 30),
    },
    INDEX_SCHEMA,
)


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this node's files, in which nothing is yet; nothing is mapped before or after."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    numbers_of.cache_clear()
    yield tmp_path / "tmp" / f"rayalign-{os.getuid()}"
    numbers_of.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "attempt"))


def read_by_another_process(folder: Store, sha256: str) -> dict[str, list[int]]:
    """The numbers of LINES, without what this process has mapped already."""
    numbers_of.cache_clear()
    return {name: column.tolist() for name, column in numbers_of(folder / "index.arrow", sha256, 10).items()}


EXPECTED = {name: LINES[name].to_pylist() for name in NUMBERS}


def test_an_index_is_written_in_parts_and_read_as_one(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BATCH_ROWS", 3)
    written = write_index(folder, (LINES.slice(start, 2) for start in range(0, 10, 2)))
    assert (written.num_rows, written.shards) == (10, {0, 1, 2, 3})
    with opened_index(folder / "index.arrow", written.sha256) as parts:
        assert parts.num_record_batches == 3
        assert parts.read_all().equals(LINES)
    numbers = numbers_of(folder / "index.arrow", written.sha256, 10)
    assert {name: column.tolist() for name, column in numbers.items()} == EXPECTED
    assert {name: column.dtype for name, column in numbers.items()} == NUMBERS


def test_lines_in_another_order_than_their_sources_are_our_mistake(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for order in ([0, 2, 1], [3, 0, 1], [6, 3]):
        with pytest.raises(AssertionError, match="not in the order"):
            write_index(folder, [LINES.take(order)])
    monkeypatch.setattr(index, "BATCH_ROWS", 1)
    with pytest.raises(AssertionError, match="not in the order"):
        write_index(folder, [LINES.slice(3, 3), LINES.slice(0, 3)])
    assert folder.list() == []


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_the_index_is_read_once_a_node_and_its_numbers_are_mapped(
    folder: Store, bucket: Path, node: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = folder if kind == "disk" else Store("s3://bucket/attempt")
    folder.make_dir()
    opened, original = [], Store.open_file
    monkeypatch.setattr(Store, "open_file", lambda store: opened.append(store.name) or original(store))
    written = write_index(folder, [LINES])
    for _ in range(3):
        assert read_by_another_process(folder, written.sha256) == EXPECTED
    assert opened == ["index.arrow"]
    columns = numbers_of(folder / "index.arrow", written.sha256, 10)
    assert numbers_of(folder / "index.arrow", written.sha256, 10) is columns
    assert not any(column.flags.owndata or column.flags.writeable for column in columns.values())
    assert {file.suffix for file in node.iterdir()} == {".numbers", ".lock"}
    assert sum(file.stat().st_size for file in node.iterdir()) == 10 * 32 + 4


def test_a_node_s_file_that_is_not_whole_is_made_anew(folder: Store, node: Path) -> None:
    written = write_index(folder, [LINES])
    read_by_another_process(folder, written.sha256)
    (file,) = node.glob("*.numbers")
    right = file.read_bytes()
    for content in (b"", right[:-1], right + b"0", bytes([right[0] ^ 1]) + right[1:], right[:-1] + bytes([right[-1] ^ 1])):
        file.unlink()  # what a process has mapped stays as it is
        file.write_bytes(content)
        assert read_by_another_process(folder, written.sha256) == EXPECTED
        assert file.read_bytes() == right


def test_an_index_is_read_anew_where_it_is_checked(folder: Store) -> None:
    written = write_index(folder, [LINES])
    file = folder / "index.arrow"
    check_index(file, written.sha256, 10)
    with pytest.raises(DamagedFile, match="has another number of lines than its manifest says"):
        check_index(file, written.sha256, 9)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DamagedFile, match=r"index\.arrow is damaged"):
        check_index(file, written.sha256, 10)
    file.delete()
    with pytest.raises(DamagedFile, match=r"index\.arrow is missing"):
        check_index(file, written.sha256, 10)
    assert read_by_another_process(folder, written.sha256) == EXPECTED  # a process that goes on needs no storage


def test_a_node_s_files_that_nothing_has_opened_for_a_day_are_deleted(folder: Store, node: Path) -> None:
    written = write_index(folder, [LINES])
    columns = numbers_of(folder / "index.arrow", written.sha256, 10)
    (old,) = node.glob("*.numbers")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    other = write_index(folder, [LINES.slice(0, 5)])
    numbers_of(folder / "index.arrow", other.sha256, 5)
    assert not old.exists()
    assert np.array_equal(columns["size"], LINES["size"].to_numpy())  # what is mapped stays


def test_a_node_without_a_place_for_the_file_says_so(folder: Store, node: Path) -> None:
    written = write_index(folder, [LINES])
    node.write_text("in the way")
    with pytest.raises(NoRoom) as caught:
        read_by_another_process(folder, written.sha256)
    assert str(caught.value) == (
        f"{node}, where each node keeps numbers of the encoded records: can't be written (File exists). Make room there, or "
        "name another folder in the variable TMPDIR on every node."
    )
