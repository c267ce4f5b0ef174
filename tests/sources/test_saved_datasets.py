"""Folders of `datasets.save_to_disk`, and Arrow files by themselves: made by `datasets` and pyarrow, read whole and by span."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from rayalign.formats.parse import parse_row
from rayalign.formats.records import RecordError
from rayalign.sources.files import Dataset, count_rows, read_rows, resolve_dataset, spans_of

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def rows(num_rows: int) -> list[dict[str, Any]]:
    return [
        {
            "query": f"q{i} é",
            "response": "Red.",
            "rejected_response": "Blue." if i % 2 else None,
            "images": [{"bytes": PNG, "path": f"{i}.png"}],
            "history": [["a", "b"]],
        }
        for i in range(num_rows)
    ]


def saved(folder: Path, num_rows: int, **options: Any) -> Path:
    datasets.Dataset.from_list(rows(num_rows)).save_to_disk(str(folder), **options)
    return folder


def all_rows(dataset: Dataset) -> list[Any]:
    return [row for file in dataset.files for _, row in read_rows(file)]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_saved_data_set_is_read_as_it_was(tmp_path: Path, num_shards: int) -> None:
    dataset = resolve_dataset(str(saved(tmp_path / "prefs", 30, num_shards=num_shards)))
    assert len(dataset.files) == num_shards
    assert sum(map(count_rows, dataset.files)) == 30
    assert all_rows(dataset) == rows(30)
    assert parse_row(all_rows(dataset)[1], id="a").images == (PNG,)


@pytest.mark.parametrize(
    ("span_rows", "sizes"),
    [(1, [1, 1]), (7, [7, 7]), (99, [99, 1]), (256, [200, 200]), (1000, [1000, 1000]), (5000, [2100])],
)
def test_spans_of_batches_hold_each_row_once(tmp_path: Path, span_rows: int, sizes: list[int]) -> None:
    """datasets writes batches of 100 rows where there are images."""
    (file,) = resolve_dataset(str(saved(tmp_path / "prefs", 2100))).files
    spans = spans_of(file, span_rows)
    assert [span.num_rows for span in spans][:2] == sizes
    assert [(n, row["query"]) for span in spans[::-1][:9] for n, row in read_rows(file, span)] == [
        (n, f"q{n} é") for span in spans[::-1][:9] for n in range(span.first_row, span.first_row + span.num_rows)
    ]
    assert sum(span.num_rows for span in spans) == count_rows(file) == 2100
    wanted = (3, 1001, 2099)
    assert [n for n, _ in read_rows(file, None, wanted)] == list(wanted)
    assert [n for span in spans for n, _ in read_rows(file, span, wanted)] == list(wanted)


def test_rows_chosen_before_saving_are_those_that_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(9)).select([5, 3]).save_to_disk(str(tmp_path / "prefs"))
    assert [row["query"] for row in all_rows(resolve_dataset(str(tmp_path / "prefs")))] == ["q5 é", "q3 é"]


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(rows(3)), test=datasets.Dataset.from_list(rows(2)))
    both.save_to_disk(str(tmp_path / "prefs"))
    with pytest.raises(ValueError) as caught:
        resolve_dataset(str(tmp_path / "prefs"))
    assert str(caught.value) == (
        f"{tmp_path}/prefs holds the splits train, test. Name the one to read, such as {tmp_path}/prefs/train."
    )
    assert len(all_rows(resolve_dataset(str(tmp_path / "prefs" / "test")))) == 2
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(3))).save_to_disk(str(tmp_path / "single"))
    assert len(all_rows(resolve_dataset(str(tmp_path / "single")))) == 3


def lose_a_shard(folder: Path) -> str:
    (folder / "data-00001-of-00003.arrow").unlink()
    return f"{folder}: its state.json names data-00001-of-00003.arrow, which isn't there. Copy the whole folder."


def make_it_old(folder: Path) -> str:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    return (
        f"{folder}/state.json: written by an old version of datasets. Write the rows as parquet: "
        "datasets.load_from_disk(FOLDER).to_parquet('rows.parquet')."
    )


@pytest.mark.parametrize("spoil", [lose_a_shard, make_it_old])
def test_a_saved_data_set_that_lacks_rows_is_refused(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    words = spoil(saved(tmp_path / "prefs", 30, num_shards=3))
    with pytest.raises(ValueError) as caught:
        resolve_dataset(str(tmp_path / "prefs"))
    assert str(caught.value) == words


def test_files_that_the_saved_data_set_does_not_name_are_not_its_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "prefs", 4)
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    assert len(all_rows(resolve_dataset(str(folder)))) == 4


def test_arrow_files_in_a_folder_that_is_no_saved_data_set_stay_out(tmp_path: Path) -> None:
    saved(tmp_path / "prefs", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"query": "a"}\n')
    (tmp_path / "data" / "x.arrow").write_bytes((tmp_path / "prefs" / "data-00000-of-00001.arrow").read_bytes())
    assert [file.name for file in resolve_dataset(str(tmp_path / "data")).files] == ["a.jsonl"]
    assert len(all_rows(resolve_dataset(str(tmp_path / "data" / "x.arrow")))) == 4


def write(path: Path, table: pa.Table, *, batch_rows: int = 2, footer: bool = False, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_file if footer else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_streams_and_files_with_a_footer_are_read(tmp_path: Path, footer: bool, compression: str | None) -> None:
    table = pa.table({"query": ["a", "b", "c", "d", "e"]})
    (file,) = resolve_dataset(str(write(tmp_path / "x.arrow", table, footer=footer, compression=compression))).files
    assert [row for _, row in read_rows(file)] == table.to_pylist()
    assert [n for span in spans_of(file, 2) for n, _ in read_rows(file, span)] == [0, 1, 2, 3, 4]


def test_a_file_without_rows_has_none(tmp_path: Path) -> None:
    (file,) = resolve_dataset(str(write(tmp_path / "x.arrow", pa.table({"query": pa.array([], pa.string())})))).files
    assert (count_rows(file), spans_of(file, 2), list(read_rows(file))) == (0, [], [])


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -9, -300])
def test_a_file_that_is_cut_off_or_none_at_all_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "x.arrow", pa.table({"query": ["a", "b", "c", "d", "e"]}))
    path.write_bytes(path.read_bytes()[:keep])
    (file,) = resolve_dataset(str(path)).files
    with pytest.raises(ValueError, match=r"x\.arrow is not a readable Arrow file: "):
        count_rows(file)


def test_text_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    (file,) = resolve_dataset(str(write(tmp_path / "x.arrow", pa.table({"query": texts}), batch_rows=3))).files
    found = [row for _, row in read_rows(file)]
    assert (found[0], found[2]) == ({"query": "a"}, {"query": "c"})
    assert isinstance(found[1], RecordError)
    assert found[1].reason == "not UTF-8"


def test_offsets_that_point_anywhere_do_not_end_the_process(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x7f\2\0\0\0"), pa.py_buffer(b"ab"))
    path = write(tmp_path / "x.arrow", pa.table({"query": ["ab", "cd"]}))
    good = path.read_bytes()
    offsets = b"\0\0\0\0\2\0\0\0\4\0\0\0"
    assert good.count(offsets) == 1
    path.write_bytes(good.replace(offsets, texts.buffers()[1].to_pybytes()))
    (file,) = resolve_dataset(str(path)).files
    assert [getattr(row, "reason", None) for _, row in read_rows(file)] == ["unreadable row", "unreadable row"]


def test_dictionary_encoded_columns_are_refused_in_words(tmp_path: Path) -> None:
    table = pa.table({"query": pa.array(["a", "a"]).dictionary_encode()})
    (file,) = resolve_dataset(str(write(tmp_path / "x.arrow", table))).files
    with pytest.raises(
        ValueError, match=r"the column query is dictionary-encoded, which isn't read\. Write the rows as parquet: "
    ):
        count_rows(file)
