"""Finding the files of a --dataset argument, and reading their rows whole, by number and by span."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.formats.parse import parse_row
from rayalign.formats.records import RecordError, Unreadable
from rayalign.sources import lines
from rayalign.sources.files import SourceFile, count_rows, read_rows, resolve_dataset, spans_of

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def source(path: Path) -> SourceFile:
    return SourceFile(str(path), path.stat().st_size, "0")


def write(path: Path, content: str | bytes) -> SourceFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return source(path)


def write_rows(folder: Path, suffix: str, num_rows: int) -> SourceFile:
    """Rows {"query": "q0 é", "response": ...}, the same in every container."""
    rows = [{"query": f"q{i} é", "response": "a,\nb" if suffix == ".csv" else f'"{i}"'} for i in range(num_rows)]
    path = folder / f"rows{suffix}"
    match suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
            return source(path)
        case ".json":
            return write(path, "\ufeff \n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        case ".csv":
            return write(path, "query,response\r\n" + "".join(f'{row["query"]},"{row["response"]}"\r\n' for row in rows))
    return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def queries(rows: Iterator[tuple[int, Any]]) -> list[tuple[int, str]]:
    return [(number, row["query"]) for number, row in rows]


def reasons(file: SourceFile) -> list[tuple[int, str | dict[str, Any]]]:
    return [(number, str(row) if isinstance(row, RecordError) else row) for number, row in read_rows(file)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_rows_come_in_order_and_are_counted(tmp_path: Path, suffix: str) -> None:
    file = write_rows(tmp_path, suffix, 20)
    assert count_rows(file) == 20
    assert queries(read_rows(file)) == [(i, f"q{i} é") for i in range(20)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wanted_rows_alone_come(tmp_path: Path, suffix: str) -> None:
    file = write_rows(tmp_path, suffix, 20)
    assert queries(read_rows(file, rows=[0, 9, 19])) == [(0, "q0 é"), (9, "q9 é"), (19, "q19 é")]
    assert queries(read_rows(file, rows=[])) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("num_rows", [1, 3, 20, 100])
def test_spans_hold_every_row_once_and_are_read_alone(tmp_path: Path, suffix: str, num_rows: int) -> None:
    file = write_rows(tmp_path, suffix, 20)
    spans = spans_of(file, num_rows)
    assert all(span.num_rows <= num_rows for span in spans)
    assert [row for span in spans for row in queries(read_rows(file, span))] == queries(read_rows(file))
    assert all(next(number for number, _ in read_rows(file, span)) == span.first_row for span in spans)
    assert [row for span in spans for row in queries(read_rows(file, span, [4, 11]))] == [(4, "q4 é"), (11, "q11 é")]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "\ufeff"])
def test_an_empty_json_file_holds_no_rows(tmp_path: Path, content: str) -> None:
    for suffix in (".json", ".jsonl") if content != "[]" else (".json",):
        file = write(tmp_path / f"a{suffix}", content)
        assert (count_rows(file), list(read_rows(file)), spans_of(file, 10)) == (0, [], [])


def test_a_broken_line_is_an_error_of_its_row_and_the_next_ones_follow(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n[1]\n{"a": "\xff"}\n"x"\n\x00\n{"a": 2}'
    file = write(tmp_path / "a.jsonl", content)
    assert count_rows(file) == 7
    assert reasons(file) == [
        (0, {"a": 1}),
        (1, "line 3, column 7: Expecting value"),
        (2, "line 4: expected a JSON object {...}, found list"),
        (3, "line 5: byte 8 is 0xff, invalid start byte"),
        (4, "line 6: expected a JSON object {...}, found str"),
        (5, "line 7, column 1: Expecting value"),
        (6, {"a": 2}),
    ]
    errors = [row for _, row in read_rows(file) if isinstance(row, RecordError)]
    assert [error.reason for error in errors] == ["broken JSON", "not an object", "not UTF-8", "not an object", "broken JSON"]


def test_json_that_is_nested_too_deeply_or_holds_a_huge_number_is_an_error_of_its_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": ' + "[" * 100_000 + "\n" + '{"a": ' + "9" * 10_000 + '}\n{"a": 1}\n')
    (_, deep), (_, huge), (_, good) = read_rows(file)
    assert str(deep) == "line 1: nested too deeply"
    assert isinstance(huge, RecordError)
    assert huge.reason == "broken JSON"
    assert good == {"a": 1}


def test_lines_longer_than_a_block_are_whole_and_too_long_ones_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 8)
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 40)
    texts = [f'{{"a": "{letter * size}"}}' for letter, size in (("x", 20), ("y", 1000), ("z", 1), ("z", 1000))]
    file = write(tmp_path / "a.jsonl", "\n".join(texts))
    assert [row if isinstance(row, dict) else row.reason for _, row in read_rows(file)] == [
        {"a": "x" * 20},
        "too long",
        {"a": "z"},
        "too long",
    ]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in read_rows(file)] == [{"a": 1}, {"a": 2}]


def test_elements_that_are_no_objects_are_errors_of_their_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", '[{"a": 1}, 5, {"a": 2}]')
    assert reasons(file) == [(0, {"a": 1}), (1, "element 1: expected a JSON object {...}, found int"), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n "data": []}', "{} holds one JSON object; expected an array of records, or one record a line."),
        (
            '[{"a": 1}, ?',
            "{} is not a JSON array: Expecting value: line 1 column 12 (char 11).",
        ),
        ('[{"a": 1} {"a": 2}]', "{} is not a JSON array: expected , or ] after element 0."),
        ('[{"a": 1}', "{} is not a JSON array: expected , or ] after element 0."),
        ('[{"a": 1}] x', "{} is not a JSON array: there is more after the closing ]."),
        ("[" * 100_000, "{} is not a JSON array: nested too deeply."),
    ],
)
def test_a_broken_array_is_an_error_of_the_file(tmp_path: Path, content: str, words: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError) as caught:
        count_rows(file)
    assert str(caught.value) == words.replace("{}", file.location, 1)


def test_csv_cells_hold_lists_numbers_and_nothing(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.csv",
        "query,response,images,history,margin,label\n"
        '"[1, 2]",b,"[""a.png"", ""b.png""]","[[""q"", ""r""]]",0.5,true\n'
        "a,7,c.png,,,\n",
    )
    (_, first), (_, second) = read_rows(file)
    assert first == {
        "query": "[1, 2]",
        "response": "b",
        "images": ["a.png", "b.png"],
        "history": [["q", "r"]],
        "margin": 0.5,
        "label": True,
    }
    assert second == {"query": "a", "response": "7", "images": "c.png", "history": None, "margin": None, "label": None}
    assert parse_row(second, id="a:1").images == ("c.png",)


def test_a_broken_csv_row_is_an_error_of_its_row(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfquery,images\na,b,c\n\n"x"y,z\n\xff,z\na,[1\na,"' + b"x" * 200_000 + b'"\ngood,z\nonly\n'
    file = write(tmp_path / "a.csv", content)
    assert count_rows(file) == 7
    assert [(number, str(row)[:60] if isinstance(row, RecordError) else row) for number, row in read_rows(file)] == [
        (0, "line 2: 3 cells, but the header names 2 columns"),
        (1, "line 4: ',' expected after '\"'; long texts and images are be"),
        (2, "query: line 5: not UTF-8 text"),
        (3, "images: line 6: Expecting ',' delimiter: line 1 column 3 (ch"),
        (4, "line 7: field larger than field limit (131072); long texts a"),
        (5, {"query": "good", "images": "z"}),
        (6, {"query": "only"}),
    ]


@pytest.mark.parametrize("cell", ["\n" * 200_000, '""\n' * 70_000, "x" * 200_000 + '\n""y'])
def test_a_csv_cell_that_is_too_long_spoils_its_own_row_only(tmp_path: Path, cell: str) -> None:
    file = write(tmp_path / "a.csv", f'query,response\na,b\nc,"{cell}"\nd,"e\nf"\n')
    rows = [row for _, row in read_rows(file)]
    assert [row.reason if isinstance(row, RecordError) else row["query"] for row in rows] == ["a", "broken CSV", "d"]
    assert [(span.first_row, span.num_rows) for span in spans_of(file, 2)] == [(0, 2), (2, 1)]
    write(tmp_path / "a.csv", f'query,response\na,b\nc,"{cell}\nd,e\n')
    with pytest.raises(ValueError, match=r"the row of line 3 is never closed\."):
        list(read_rows(file))


def test_a_csv_file_without_a_header_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "\n")
    with pytest.raises(ValueError, match=r"a\.csv: expected a first line with the names of the columns\.$"):
        count_rows(file)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file: "):
        count_rows(file)


def test_a_damaged_row_group_names_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [f"{i:099}" for i in range(100)]}), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:400] = bytes(396)
    file = write(tmp_path / "a.parquet", bytes(content))
    with pytest.raises(ValueError, match=r"a\.parquet: row group 0 can't be read: "):
        list(read_rows(file))


def test_text_of_parquet_that_is_not_utf8_is_an_error_of_its_cell(tmp_path: Path) -> None:
    column = _unchecked([b"a", b"\xff", b"b"])
    pq.write_table(pa.table({"query": column}), tmp_path / "a.parquet")
    rows = list(read_rows(source(tmp_path / "a.parquet")))
    words = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    assert [row["query"] for _, row in rows if isinstance(row, dict)] == ["a", Unreadable("not UTF-8", words), "b"]


def test_a_cell_that_python_can_not_hold_spoils_no_other(tmp_path: Path) -> None:
    table = pa.table(
        {"query": ["a", "b"], "seen": pa.array([0, -(2**62)], pa.timestamp("ms")), "born": pa.array([0, 2**30], pa.date32())}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in read_rows(source(tmp_path / "a.parquet")) if isinstance(row, dict)]
    assert [row["query"] for row in rows] == ["a", "b"]
    assert [isinstance(cell, Unreadable) for cell in rows[1].values()] == [False, True, True]
    record = {"response": "c", "rejected_response": "d"}
    assert parse_row(rows[1] | record, id="a").chosen == "c"
    with pytest.raises(RecordError) as caught:
        parse_row({"query": rows[1]["seen"], **record}, id="a")
    assert (caught.value.reason, caught.value.field) == ("unreadable cell", "query")


def _unchecked(values: list[bytes]) -> pa.Array:
    """Bytes called text, as a careless writer leaves them."""
    binary = pa.array(values, type=pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_nulls_of_parquet_count_as_absent_and_its_images_are_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {
            "question": ["What?"],
            "chosen": ["A cat."],
            "rejected": pa.array([None], pa.string()),
            "image": [{"bytes": b"\x89PNG", "path": None}],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    ((_, row),) = read_rows(source(tmp_path / "a.parquet"))
    assert isinstance(row, dict)
    record = parse_row(row, id="a:0")
    assert (record.rejected, record.images) == (None, (b"\x89PNG",))


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"a": [f"{i:099}" for i in range(100)]}), tmp_path / "a.parquet", use_dictionary=False, row_group_size=50
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:400] = bytes(396)  # damages the first group
    file = write(tmp_path / "a.parquet", bytes(content))
    assert [number for number, _ in read_rows(file, rows=[50, 99])] == [50, 99]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a.parquet",
        "deep/er/c.json",
        "deep/d.csv",
        ".hidden.jsonl",
        ".git/e.jsonl",
        "cat.png",
        "deep/f.JSONL",
    ):
        write(tmp_path / name, "")
    return tmp_path


def names(argument: str, root: Path) -> list[str]:
    return [os.path.relpath(file.location, root) for file in resolve_dataset(argument).files]


def test_a_file_is_resolved_with_its_size_and_time(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1}\n')
    dataset = resolve_dataset(f"{tmp_path}/a.jsonl#10")
    assert (dataset.argument, dataset.name, dataset.sample) == (f"{tmp_path}/a.jsonl#10", "a.jsonl", 10)
    modified = str((tmp_path / "a.jsonl").stat().st_mtime_ns)
    assert dataset.files == (SourceFile(f"{tmp_path}/a.jsonl", 9, modified),)
    assert dataset.files[0].name == "a.jsonl"


def test_a_folder_is_its_data_files_at_any_depth_without_hidden_ones(tree: Path) -> None:
    assert names(str(tree), tree) == ["a.parquet", "b.jsonl", "deep/d.csv", "deep/er/c.json", "deep/f.JSONL"]
    assert names(f"{tree}/", tree) == names(str(tree), tree)
    assert names(f"file://{tree}", tree) != []


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("[ab].*", ["a.parquet", "b.jsonl"]),
        ("?.jsonl", ["b.jsonl"]),
        ("deep/*", ["deep/d.csv", "deep/er/c.json", "deep/f.JSONL"]),
        ("**/*.json", ["deep/er/c.json"]),
        ("d*/er/*.json", ["deep/er/c.json"]),
        ("*", ["a.parquet", "b.jsonl", "deep/d.csv", "deep/er/c.json", "deep/f.JSONL"]),
    ],
)
def test_a_glob_is_the_data_files_that_match(tree: Path, pattern: str, found: list[str]) -> None:
    assert names(f"{tree}/{pattern}", tree) == found


HOW_TO_READ = "Unpack what is compressed, write other kinds as .jsonl or .parquet, and name an Arrow file by its own path."


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*"])
def test_what_looks_like_data_and_is_not_read_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson", "d.TSV", "deep/e.csv.zst", "deep/f.xlsx", "old.jsonl.bak"):
        write(tmp_path / name, "")
    for name in ("README.md", "cat.png", "images.tar.gz", "images.zip", "notes.txt", ".g.tsv", "tsv"):
        write(tmp_path / name, "")
    for _ in range(2):
        assert names(f"{tmp_path}{pattern}", tmp_path) == ["a.jsonl"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Data: {tmp_path}{pattern}: passed over, and they look like data: b.jsonl.gz, c.ndjson, d.TSV and 3 more. "
        f"{HOW_TO_READ}"
    ]
    caplog.clear()
    assert names(f"{tmp_path}/*.jsonl", tmp_path) == ["a.jsonl"]
    assert caplog.records == []


def test_an_arrow_file_by_itself_in_a_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "x.arrow", "")
    write(tmp_path / "cache" / "cache-1.arrow", "")  # as `datasets` writes
    kinds = ".jsonl, .json, .parquet, .csv, .arrow"
    with pytest.raises(ValueError) as caught:
        resolve_dataset(str(tmp_path))
    assert str(caught.value) == (
        f"Dataset '{tmp_path}': the folder {tmp_path} holds no file that ends in {kinds}, but x.arrow. {HOW_TO_READ}"
    )
    write(tmp_path / "a.jsonl", "")
    assert names(str(tmp_path), tmp_path) == ["a.jsonl"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Data: {tmp_path}: passed over, and they look like data: x.arrow. {HOW_TO_READ}"
    ]
    assert names(f"{tmp_path}/*.*", tmp_path) == ["a.jsonl", "x.arrow"]
    write(tmp_path / "b" / "c.tsv.gz", "")
    with pytest.raises(ValueError, match=r"and ends in .*, but b/c\.tsv\.gz\. Unpack"):
        resolve_dataset(f"{tmp_path}/b*")


def test_a_relative_path_starts_from_the_current_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert names("b.jsonl#5", tree) == ["b.jsonl"]


def test_a_file_with_a_number_sign_in_its_name_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a#b.jsonl", "")
    assert resolve_dataset(f"{tmp_path}/a#b.jsonl").sample is None
    assert resolve_dataset(f"{tmp_path}/a#b.jsonl#3").sample == 3


@pytest.mark.parametrize("number", ["0", "x", "", "-1", "1.5", "1e3"])
def test_a_draw_must_be_a_positive_number(number: str) -> None:
    with pytest.raises(ValueError, match="Write NAME#1000 to draw 1000 of them") as caught:
        resolve_dataset(f"rlaif-v#{number}")
    assert str(caught.value) == (
        f"Dataset 'rlaif-v#{number}': #{number} is no number of records. Write NAME#1000 to draw 1000 of them, or leave it out."
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "{}/c.jsonl",
            "there is no file or folder {}/c.jsonl, nor a registered name (these are: rlaif-v). Did you mean {}/b.jsonl?",
        ),
        ("{}/zzz", "there is no file or folder {}/zzz, nor a registered name (these are: rlaif-v)."),
        (
            "{}/rlaifv",
            "there is no file or folder {}/rlaifv, nor a registered name (these are: rlaif-v). Did you mean rlaif-v?",
        ),
        ("{}/cat.png", "{}/cat.png must end in .jsonl, .json, .parquet, .csv, .arrow."),
        ("{}/empty", "the folder {}/empty holds no file that ends in .jsonl, .json, .parquet, .csv, .arrow."),
        ("{}/x*.jsonl", "nothing matches {}/x*.jsonl and ends in .jsonl, .json, .parquet, .csv, .arrow."),
        ("#5", "there is no name. Give a file, a folder, a glob or one of rlaif-v."),
        ("", "there is no name. Give a file, a folder, a glob or one of rlaif-v."),
    ],
)
def test_what_can_not_be_found_is_said_with_what_to_do(tree: Path, argument: str, words: str) -> None:
    (tree / "empty").mkdir()
    argument = argument.replace("{}", str(tree))
    with pytest.raises(ValueError) as caught:
        resolve_dataset(argument)
    assert str(caught.value) == f"Dataset '{argument}': {words.replace('{}', str(tree))}"


def test_an_unknown_scheme_is_said() -> None:
    with pytest.raises(ValueError, match=r"Give a path, s3://\.\.\., gs://\.\.\. or file://\.\.\.$"):
        resolve_dataset("ftp://host/a.jsonl")


def test_a_registered_name_says_offline_how_to_pass_a_local_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^Dataset 'rlaif-v' is openbmb/RLAIF-V-Dataset on the Hugging Face hub") as caught:
        resolve_dataset("rlaif-v#1000")
    assert str(caught.value).endswith(
        "Download it where there is a network (hf download openbmb/RLAIF-V-Dataset --repo-type dataset --local-dir FOLDER) "
        "and pass the FOLDER instead."
    )


def test_links_that_lead_around_and_what_is_no_file_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text('{"query": "q"}\n')
    (tmp_path / "latest").symlink_to(tmp_path)  # around in a circle
    (tmp_path / "deep" / "up").symlink_to(tmp_path / "latest")
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "deep" / "a.jsonl")
    (tmp_path / "deep" / "b.jsonl").symlink_to(tmp_path / "deep" / "a.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for argument in (str(tmp_path), f"{tmp_path}/**/*.jsonl", f"{tmp_path}/deep/*.jsonl"):
        files = resolve_dataset(argument).files
        assert [os.path.realpath(file.location) for file in files] == [str(tmp_path / "deep" / "a.jsonl")], argument


def test_a_quote_that_is_never_closed_is_told_by_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("query,response\none,two\nthree,four\n" + 'five,"six\n' + "seven,eight\n" * 3)
    with pytest.raises(ValueError) as caught:
        spans_of(resolve_dataset(str(path)).files[0], 2)
    assert str(caught.value) == (
        f"{path}: a quote that is opened in the row of line 4 is never closed. Close it, or double it where it is part of the "
        "text."
    )


@pytest.mark.parametrize("where", ["footer's length", "footer", "end"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, where: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"query": ["a"] * 100}), path)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    start, end = {"footer's length": (-8, -4), "footer": (footer, footer + 40), "end": (-4, len(content))}[where]
    content[start:end] = b"\xff" * len(content[start:end])
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_rows(resolve_dataset(str(path)).files[0]))
    assert str(caught.value).startswith(f"{path} is not a readable parquet file: ")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            'Hi\rthere,"First.\nSecond, that"',
            "line 2: a carriage return stands in a cell without quotes; put cells that hold one into quotes",
        ),
        (
            '"a" b,"line1\nline2,X"',
            "line 2: ',' expected after '\"'; long texts and images are better kept in .jsonl or .parquet files",
        ),
        # Quotes inside of a cell without quotes are text, and open nothing.
        (
            'a 5" pipe\r,b',
            "line 2: a carriage return stands in a cell without quotes; put cells that hold one into quotes",
        ),
        (
            '"a" b" c,"""d"" e\n""f\n",g\r,h',
            "line 2: ',' expected after '\"'; long texts and images are better kept in .jsonl or .parquet files",
        ),
    ],
)
def test_a_broken_csv_row_ends_where_its_last_quoted_cell_does(tmp_path: Path, row: str, words: str) -> None:
    file = write(tmp_path / "a.csv", f"query,response\n{row}\nQ2,A2\n")
    assert reasons(file) == [(0, words), (1, {"query": "Q2", "response": "A2"})]
    assert [(span.first_row, span.num_rows) for span in spans_of(file, 1)] == [(0, 1), (1, 1)]


def test_blanks_around_the_names_of_a_csv_header_do_not_count(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", ", query, response ,\n0,Q,A,x\n")
    assert reasons(file) == [(0, {"(column 1)": "0", "query": "Q", "response": "A", "(column 4)": "x"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            b"query,response\rQ,A\r",
            "{}: its lines end in carriage returns (\\r), which aren't read as line ends. Save it with line feeds (\\n or "
            "\\r\\n).",
        ),
        (
            "a.csv",
            b'"query","response"\r"Q","A"\r',
            "{}: its lines end in carriage returns (\\r), which aren't read as line ends. Save it with line feeds (\\n or "
            "\\r\\n).",
        ),
        ("a.csv", "query,response\nQ,A\n".encode("utf-16"), "{} is UTF-16 text, which isn't read. Save it as UTF-8."),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "{} is UTF-16 text, which isn't read. Save it as UTF-8."),
        ("a.json", b"\xfe\xff" + '[{"a": 1}]'.encode("utf-16-be"), "{} is UTF-16 text, which isn't read. Save it as UTF-8."),
    ],
)
def test_a_text_file_in_another_encoding_or_with_other_line_ends_says_so(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        count_rows(file)
    assert str(caught.value) == words.replace("{}", file.location)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow"])
def test_two_columns_of_one_name_are_an_error_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    table = pa.Table.from_arrays([pa.array(["Q"]), pa.array(["A"]), pa.array(["B"])], ["query", "response", "response"])
    match suffix:
        case ".csv":
            path.write_text("query,response, response\nQ,A,B\n")
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
    with pytest.raises(ValueError) as caught:
        list(read_rows(source(path)))
    assert str(caught.value) == f"{path} has several columns named response. Give each a name of its own, or take one out."


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_json_object_with_two_keys_of_one_name_is_an_error_of_its_row(tmp_path: Path, suffix: str) -> None:
    rows = ['{"a": "x", "a": "y"}', '{"b": [{"role": "user", "c": 1, "role": "user"}]}', '{"a": 1, "b": {"a": 1}}']
    file = write(tmp_path / f"a{suffix}", "\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]")
    where = ("line 1", "line 2") if suffix == ".jsonl" else ("element 0", "element 1")
    assert reasons(file) == [
        (0, f"{where[0]}: an object has several keys 'a'; keep one of them"),
        (1, f"{where[1]}: an object has several keys 'role'; keep one of them"),
        (2, {"a": 1, "b": {"a": 1}}),
    ]


def test_json_in_a_csv_cell_has_each_key_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'query,images\nQ,"{""path"": ""a.png"", ""path"": ""b.png""}"\n')
    assert reasons(file) == [(0, "images: line 2: an object has several keys 'path'; keep one of them")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '[{"a": 1}, {"a": 2}]\n{"a": 3}',
            "line 1: expected a JSON object {...}, found list; if the file holds a JSON array, call it .json",
        ),
        ('[\n{"a": 1}\n]', "line 1, column 2: Expecting value; if the file holds a JSON array, call it .json"),
    ],
)
def test_a_json_array_in_a_file_of_lines_is_told_how_to_be_called(tmp_path: Path, content: str, words: str) -> None:
    assert reasons(write(tmp_path / "a.jsonl", content))[0] == (0, words)
