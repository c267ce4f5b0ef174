"""From a raw row to an encoded pair, or to why it is dropped: what each algorithm makes of pairs and of labelled responses."""

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from rayalign.algorithms import ALGORITHMS
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.remarks import RowsSeen, remarks, unread_pictures
from rayalign.data.rows import OUTCOME_SCHEMA, FilePart, PrepareTask, Sources, encode_row, write_task
from rayalign.data.store import EncodedPair
from rayalign.data.truncation import RecordTooLong
from rayalign.formats.columns import Renames
from rayalign.formats.records import RecordError, Responses
from rayalign.sources.files import resolve_dataset, spans_of
from rayalign.storage import Store

IT_IS_TWO = [44, 87, 271, 305, 17, 2]  # "I", "t", " is", " two", ".", end
A_CAT = [68, 299, 2]  # "a", " cat", end
QUESTION = {"query": "Which digit?"}
RESPONSE = QUESTION | {"response": "It is two."}
PAIR = RESPONSE | {"rejected_response": "a cat"}


@pytest.fixture
def encode(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str, Mapping[str, Any]], EncodedPair]:
    """`encode(algorithm, row)`."""

    def encode_one(algorithm: str, row: Mapping[str, Any]) -> EncodedPair:
        needs = ALGORITHMS[algorithm]().needs
        spec = EncoderSpec(str(model_folder("llava")), responses=needs.responses)
        return encode_row(row, id="a.jsonl:3", folder=Store(str(tmp_path)), sources=Sources((), None, False), spec=spec).pair

    return encode_one


Encode = Callable[[str, Mapping[str, Any]], EncodedPair]


@pytest.mark.parametrize(
    ("row", "chosen_ids", "rejected_ids"),
    [
        (RESPONSE | {"label": True}, IT_IS_TWO, []),
        (RESPONSE | {"label": 1}, IT_IS_TWO, []),
        (RESPONSE | {"label": False}, [], IT_IS_TWO),
        (RESPONSE | {"label": 0}, [], IT_IS_TWO),
        (RESPONSE | {"label": 0, "rejected_response": None}, [], IT_IS_TWO),  # an empty cell counts as absent
        (PAIR, IT_IS_TWO, A_CAT),
        (PAIR | {"label": None}, IT_IS_TWO, A_CAT),
        (PAIR | {"label": True}, IT_IS_TWO, A_CAT),
        ({"prompt": "Which digit?", "completion": "It is two.", "label": False}, [], IT_IS_TWO),
    ],
)
def test_kto_takes_pairs_and_labelled_responses(
    encode: Encode, row: Mapping[str, Any], chosen_ids: list[int], rejected_ids: list[int]
) -> None:
    pair = encode("kto", row)
    assert (pair.id, pair.chosen_ids, pair.rejected_ids) == ("a.jsonl:3", chosen_ids, rejected_ids)


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (
            RESPONSE,
            "missing field",
            "label: the record has one response and does not say whether it is good; add label (true or false), or a rejected "
            "response",
        ),
        (
            PAIR | {"label": False},
            "contradictory label",
            "label: the chosen response is labelled as bad, although there is a rejected one; remove the label, or keep one "
            "response",
        ),
        (RESPONSE | {"label": "true"}, "wrong type", "label: expected true or false, found 'true'"),
        (RESPONSE | {"label": -1}, "wrong type", "label: expected true or false, found -1"),
    ],
)
def test_kto_drops_what_does_not_say_which_response_is_good(
    encode: Encode, row: Mapping[str, Any], reason: str, words: str
) -> None:
    with pytest.raises(RecordError) as caught:
        encode("kto", row)
    assert (caught.value.reason, caught.value.field, str(caught.value)) == (reason, "label", words)


def test_sft_drops_what_is_labelled_as_bad_and_imitates_the_rest(encode: Encode) -> None:
    for row in (RESPONSE, RESPONSE | {"label": True}, PAIR):
        assert (encode("sft", row).chosen_ids, encode("sft", row).rejected_ids) == (IT_IS_TWO, [])
    with pytest.raises(RecordError) as caught:
        encode("sft", RESPONSE | {"label": False})
    assert (caught.value.reason, str(caught.value)) == (
        "undesirable response",
        "label: the response is labelled as bad, and sft imitates responses",
    )


COMPARING = [name for name, algorithm in ALGORITHMS.items() if algorithm().needs.responses == "both"]


@pytest.mark.parametrize("algorithm", COMPARING)
@pytest.mark.parametrize("label", [None, True, False])
def test_what_compares_two_responses_drops_single_ones(encode: Encode, algorithm: str, label: bool | None) -> None:
    assert encode(algorithm, PAIR).rejected_ids == A_CAT
    with pytest.raises(RecordError) as caught:
        encode(algorithm, RESPONSE | {"label": label})
    assert (caught.value.reason, caught.value.field) == ("missing field", "rejected_response")
    assert str(caught.value) == (
        "rejected_response: the record has one response only, and this algorithm compares a chosen with a rejected one; "
        "add the column, or train with sft (or kto, with a label)"
    )


def test_dpo_and_its_kin_compare_and_kto_and_sft_do_not() -> None:
    assert COMPARING == ["dpo", "mdpo", "rm", "cpo", "orpo", "simpo"]


def whole_file(sources: Sources) -> PrepareTask:
    return PrepareTask((FilePart(0, 0, tuple(spans_of(sources.datasets[0].files[0], 256)), None),))


def test_whatever_goes_wrong_with_a_row_drops_that_row(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A processor refuses one picture by an exception of its own; the rows around it are encoded."""
    Image.new("RGB", (1, 250)).save(tmp_path / "line.png")  # Qwen's: "absolute aspect ratio must be smaller than 200"
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    rows = [PAIR | {"images": [name]} for name in ("good.png", "line.png", "good.png")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources((resolve_dataset(str(tmp_path / "a.jsonl")),), None, False)
    spec = EncoderSpec(str(model_folder("qwen2_vl")), responses="both")
    task = whole_file(sources)
    lines = write_task(task, Store(str(tmp_path / "shards")), itertools.count(), sources, spec)
    assert [line.get("reason") for line in lines] == [None, "unusable record", None]
    assert lines[1]["source_row"] == 1
    assert lines[1]["detail"] == "ValueError: absolute aspect ratio must be smaller than 200, got 250.0"


def test_a_model_that_can_encode_nothing_and_a_record_too_long_for_raise_are_no_faults_of_rows(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both", max_length=4, truncation_strategy="raise")
    with pytest.raises(RecordTooLong, match="has 19 tokens and --max_length is 4"):
        encode_row(PAIR, id="a", folder=Store(str(tmp_path)), sources=Sources((), None, False), spec=spec)
    folder = tmp_path / "broken"
    shutil.copytree(model_folder("llava"), folder)
    (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    spec = EncoderSpec(str(folder), responses="both")
    with pytest.raises(ValueError, match="in no form") as caught:
        encode_row(PAIR, id="a", folder=Store(str(tmp_path)), sources=Sources((), None, False), spec=spec)
    assert not isinstance(caught.value, RecordError)


@pytest.fixture
def outcome_of_rows(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., pa.Table]:
    """`outcome_of_rows(rows, columns, model, responses)`: what a task reports of a file with these rows."""
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")

    def outcome(
        rows: list[dict[str, Any]], columns: Renames = (), model: str = "llava", responses: Responses = "both"
    ) -> pa.Table:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = Sources((resolve_dataset(str(tmp_path / "a.jsonl")),), None, False, (), columns)
        spec = EncoderSpec(str(model_folder(model)), responses=responses)
        lines = write_task(
            whole_file(sources),
            Store(str(tmp_path / "shards")),
            itertools.count(),
            sources,
            spec,
        )
        return pa.Table.from_pylist(lines, schema=OUTCOME_SCHEMA)

    return outcome


Outcome = Callable[..., pa.Table]
WITH_PATH = PAIR | {"image_path": "a.png"}


def test_a_picture_in_a_column_that_nothing_reads_drops_the_record_until_it_is_renamed(outcome_of_rows: Outcome) -> None:
    rows = [WITH_PATH, PAIR, PAIR | {"images": ["a.png"], "image_path": "b.png"}, PAIR | {"picture": "x/y.jpg"}]
    assert outcome_of_rows(rows)["reason"].to_pylist() == ["picture not read", None, None, "picture not read"]
    renamed = outcome_of_rows([WITH_PATH, PAIR], (("image_path", "images"),))
    assert (renamed["reason"].to_pylist(), renamed["num_images"].to_pylist()) == ([None, None], [1, 0])


def test_a_language_model_has_no_use_for_pictures(outcome_of_rows: Outcome) -> None:
    assert outcome_of_rows([WITH_PATH], (), "qwen2")["reason"].to_pylist() == [None]


def test_columns_are_said_once_a_task_and_hostile_names_do_no_harm(outcome_of_rows: Outcome) -> None:
    rows = [
        PAIR | {"id": 1},
        PAIR | {"id": 2, "source": "x"},
        {"\ud800": 1},
        PAIR | {"\ud800 \n": "a" * 9},
        PAIR | {"\ud800": "a.png"},
    ]
    rows += [PAIR | {f"{'long' * 999}{i}": 1 for i in range(100)}]
    table = outcome_of_rows(rows, (("none", "images"), ("id", "history")))
    assert table["unread"].to_pylist()[1] == ["source"]
    assert table["renamed"].to_pylist()[:2] == [["id"], []]
    table = outcome_of_rows(rows)
    assert table["unread"].to_pylist()[:5] == [["id"], ["source"], [], ["?"], []]
    assert max(map(len, table["unread"].to_pylist()[5])) < 70
    assert table["field"].to_pylist()[4] == "?"


def said(table: pa.Table, columns: Renames = (), model: str | None = "my/model", **responses: Any) -> list[tuple[int, str]]:
    """What is said of a task's outcome, which arrives in two tables."""
    seen = RowsSeen()
    for part in (table.slice(0, 1), table.slice(1)):
        seen.add(part)
    assert seen.num_rows == table.num_rows
    return remarks([seen], ["a.jsonl"], columns, looks_at_pictures=model, **responses)


def test_what_is_left_out_is_said_once_for_a_data_set(outcome_of_rows: Outcome) -> None:
    words = (
        "a.jsonl: NO RECORD HAS A PICTURE, and my/model is a vision-language model: of these records it learns from the text "
        "alone. If their pictures stand in a column of another name, pass --columns NAME=images."
    )
    rows = [PAIR | {"id": 1, "sytem": "x"}, PAIR | {"id": 2}]
    unread = "a.jsonl: columns that are not read: id, sytem. Did you mean --columns sytem=system?"
    table = outcome_of_rows(rows)
    assert said(table) == [(logging.INFO, unread), (logging.WARNING, words)]
    assert said(table, model=None) == [(logging.INFO, unread)]
    assert said(outcome_of_rows([PAIR, PAIR | {"images": ["a.png"]}])) == []
    absent = (("none", "images"),)
    assert said(outcome_of_rows([PAIR | {"images": ["a.png"]}], absent), absent) == [
        (logging.WARNING, "a.jsonl: --columns none=images: no row has a column none.")
    ]


def test_a_column_of_another_record_format_is_not_taken_for_a_slip_of_the_hand(outcome_of_rows: Outcome) -> None:
    row = {"prompt": "Which?", "chosen": "a", "rejected": "b", "history": [["Hi.", "Hello."]], "query": "?", "sytem": "x"}
    assert said(outcome_of_rows([row]), model=None) == [
        (
            logging.INFO,
            "a.jsonl: columns that are not read: history, query, sytem. Only other record formats read history, query. Did you "
            "mean --columns sytem=system?",
        )
    ]


def test_records_in_which_a_token_would_cross_into_a_response_are_counted(outcome_of_rows: Outcome) -> None:
    crossing = [PAIR | {"response": "is"}, PAIR | {"rejected_response": "is"}]  # " is" is one token, behind "ASSISTANT: "
    table = outcome_of_rows([PAIR, *crossing, PAIR | {"response": "is "}, {"query": "?"}])
    assert table["crosses_seam"].to_pylist() == [False, True, True, True, None]
    assert said(table, model=None) == [
        (
            logging.INFO,
            "a.jsonl: in 3 of 4 records, a token would cross from the prompt into a response (such as a line break at the end "
            "of the one and at the beginning of the other). They keep the prompt's tokens as generation sees them, and the "
            "response's behind these.",
        )
    ]


GOOD, BAD = RESPONSE | {"label": True}, RESPONSE | {"label": False}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, GOOD], "NO RECORD HAS A BAD RESPONSE, and all 2 have a good one"),
        ([BAD, {"query": "?"}], "NO RECORD HAS A GOOD RESPONSE, and all 1 have a bad one"),
        ([GOOD, BAD], ""),
        ([PAIR], ""),
    ],
)
def test_single_responses_of_one_kind_are_told(outcome_of_rows: Outcome, rows: list[dict[str, Any]], words: str) -> None:
    told = said(outcome_of_rows(rows, responses="either"), model=None, responses="either")
    rest = ": what tells them apart can't be learned from these. Look at the records' labels, or add records of the other kind."
    assert told == ([(logging.WARNING, f"a.jsonl: {words}{rest}")] if words else [])


@pytest.mark.parametrize(
    ("lost", "refused"), [({"a": 1}, False), ({"a": 2}, True), ({"b": 2}, False), ({"a": 1, "b": 6}, True), ({}, False)]
)
def test_a_data_set_whose_pictures_are_not_read_is_refused(lost: Mapping[str, int], refused: bool) -> None:
    """Two data sets of 20 and 100 rows, 5 % of which may be dropped."""
    dropped = [
        {"dataset": dataset, "reason": "picture not read", "field": field}
        for dataset, count in lost.items()
        for field in (["img"] + ["photo"] * count)[-count:]
    ]
    dropped += [{"dataset": "a", "reason": "image missing", "field": "images"}] * 9
    words = unread_pictures(dropped, {"a": 20, "b": 100}, limit=0.05)
    assert (words is not None) == refused
    if lost == {"a": 2}:
        assert words == (
            "a: 2 of 20 records have what looks like their picture in a column that no record format reads: photo. Pass "
            "--columns photo=images, or take the column out of the rows."
        )
