"""Which responses are set against each other: best with worst, without ties, near-duplicates and what did not end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.formats.parse import parse_row
from rayalign.rounds.pairs import ALIKE, CLOSE, CUT, EMPTY, SAME, by_prompt, choose_pairs, pair_row, write_pairs
from rayalign.storage import Store

PROMPT = {"system": None, "query": "<image>Which?", "history": [["Hello.", "Hello."]], "prompt_id": "p:0", "extra": "{}"}


def lines(*scored: tuple[str, float], **others: Any) -> list[dict[str, Any]]:
    return [
        {**PROMPT, "sample": i, "response": text, "score": score, "is_ended": True, **others}
        for i, (text, score) in enumerate(scored)
    ]


FIVE = lines(("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 0.0), ("e", 2.5))


@pytest.mark.parametrize(
    ("per_prompt", "margin", "expected"),
    [
        (1, 0.0, ["bd"]),
        (2, 0.0, ["bd", "ea"]),
        (5, 0.0, ["bd", "ea"]),  # each response stands in one pair
        (2, 1.5, ["bd"]),  # strictly more than the margin
        (1, 3.0, []),
        (0, 1.4, ["ba", "bd", "ea", "ed", "cd"]),
    ],
)
def test_pairs_are_of_the_best_and_the_worst_or_all_above_a_margin(per_prompt: int, margin: float, expected: list[str]) -> None:
    pairs = choose_pairs(FIVE, per_prompt=per_prompt, margin=margin, max_similarity=1.0).pairs
    assert [better["response"] + worse["response"] for better, worse in pairs] == expected


def test_ties_near_duplicates_and_responses_that_did_not_end_are_left_out() -> None:
    def texts(responses: list[dict[str, Any]], max_similarity: float = 1.0, per_prompt: int = 0) -> list[tuple[str, str]]:
        pairs = choose_pairs(responses, per_prompt=per_prompt, margin=0.0, max_similarity=max_similarity).pairs
        return [(better["response"], worse["response"]) for better, worse in pairs]

    assert texts(lines(("a", 1.0), ("b", 1.0))) == []
    assert texts(lines(("A cat.", 1.0), ("a  cat", 0.0), ("A dog.", 0.5))) == [("A cat.", "A dog.")]
    near = lines(("The digits are 1 2 3 4.", 4.0), ("The digits are 1 2 3 5.", 3.0))
    assert texts(near) == [("The digits are 1 2 3 4.", "The digits are 1 2 3 5.")]
    assert texts(near, 0.9) == []
    cut = lines(("a", 2.0), is_ended=False) + lines(("b", 1.0), ("c", 0.0), ("", -1.0))
    assert texts(cut, per_prompt=1) == [("b", "c")]


def test_what_is_left_out_is_counted_by_reason() -> None:
    some = lines(("a", 2.0), is_ended=False) + lines(("b", 1.0), ("B.", 0.0), (" ", -1.0), ("c", 1.0), ("dd", 0.5), ("dd e", 0))
    choice = choose_pairs(some, per_prompt=0, margin=0.2, max_similarity=0.6)
    assert [(better["response"], worse["response"]) for better, worse in choice.pairs] == [
        *(("b", "dd"), ("b", "dd e")),
        *(("c", "dd"), ("c", "dd e")),
    ]
    assert choice.left_out == {CUT: 1, SAME: 1, EMPTY: 1, CLOSE: 1, ALIKE: 1}  # b and c score the same; dd is in dd e
    assert choose_pairs(some, per_prompt=1, margin=0.2, max_similarity=0.6).left_out == {CUT: 1, SAME: 1, EMPTY: 1}


def write_scores(folder: Path, files: Mapping[str, list[tuple[str, int]]]) -> Store:
    """A pool's folder with files of (prompt, sample)."""
    (folder / "rows").mkdir(parents=True)
    for name, rows in files.items():
        pq.write_table(
            pa.Table.from_pylist([{"prompt_id": p, "sample": k} for p, k in rows]), folder / "rows" / f"{name}.parquet"
        )
    return Store(str(folder))


def test_the_responses_of_a_prompt_are_found_in_whichever_files_they_are(tmp_path: Path) -> None:
    prompts = ["1.9/a:2", "1.9/a:10", "1.10/a:0"]
    rows = [(prompt, k) for prompt in prompts for k in range(3)]
    expected = [[(prompt, k) for k in range(3)] for prompt in prompts]
    late = [rows[1], rows[2], rows[6]]  # dropped at first, and scored at a later start
    ways = {
        "at_once": {"000": rows},
        "in_groups": {"000": rows[:4], "004": rows[4:]},
        "resumed": {"000": [row for row in rows if row not in late], "001": late},
        "resumed_twice": {"000": rows[3:6], "001": rows[6:], "002": [rows[2]], "003": [rows[0], rows[1]]},
    }
    for name, files in ways.items():
        found = by_prompt(write_scores(tmp_path / name, files))
        assert [[(line["prompt_id"], line["sample"]) for line in lines] for lines in found] == expected, name


def test_a_pair_is_a_record_of_the_native_format_that_knows_where_it_comes_from(tmp_path: Path) -> None:
    lineage = {"round": 2, "model": "runs/1", "scorer": "python=a:b", "seed": 7}
    rows = [pair_row(FIVE[1], FIVE[3], [{"bytes": b"\x89PNG", "path": None}], lineage) for _ in range(3)]
    folder = Store(str(tmp_path / "pairs"))
    assert write_pairs(rows * 400, folder) == 1200
    assert write_pairs(rows, folder) == 3  # what was there before is replaced
    (file,) = (tmp_path / "pairs").iterdir()
    read = pq.read_table(file).to_pylist()[0]
    own = {"prompt": "p:0", "chosen_sample": 1, "rejected_sample": 3, "chosen_score": 3.0, "rejected_score": 0.0}
    assert read["lineage"] == lineage | own
    record = parse_row(read, id="x")
    assert (record.chosen, record.rejected, record.images) == ("b", "d", (b"\x89PNG",))
    assert [message.content for message in record.messages] == ["Hello.", "Hello.", "<image>Which?"]
