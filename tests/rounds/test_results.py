"""What rounds leave behind: rounds.json, and a page made of their folders."""

import dataclasses
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayalign.report.rounds_page import render_rounds
from rayalign.rounds.pairs import pair_row, write_pairs
from rayalign.rounds.results import PAGE, ROUNDS, Round, page_of, write_results
from rayalign.storage import Store

FLAGS: dict[str, Any] = {
    "rlhf_type": "dpo",
    "dataset": ("prompts.jsonl",),
    "val_dataset": ("held_out.jsonl",),
    "scorer": ("python=<b>:f",),
    "num_rounds": 3,
}
RIGHT = {1: [1.0, 0.0, 0.0, 1.0], 2: [1.0, 1.0, 1.0, 0.0]}
"""Of each round, which held-out records its model is right on."""


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def json_lines(rows: list[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def made_round(folder: Path, number: int) -> Round:
    """Writes what a round's stages leave that the page reads."""
    place = folder / f"round_{number}"
    for name in ("responses", "scores/rows", "pairs", "train"):
        (place / name).mkdir(parents=True)
    (place / "responses" / "dropped.jsonl").write_text(json_lines([{"id": "p:9", "reason": "image missing"}]))
    (place / "scores" / "dropped.jsonl").write_text("")
    pq.write_table(pa.table({"score": [3.0, 1.0, 2.0]}), place / "scores" / "rows" / "0.parquet")
    line = {
        "system": "Be <i>brief</i>.",
        "query": "<image>Which?",
        "history": [["Hello.", "Hi."]],
        "prompt_id": "p:0",
        "sample": 0,
    }
    lineage = {"round": number, "model": "start", "scorer": "python=<b>:f", "seed": 7}
    better, worse = {**line, "response": "a <cat>", "score": 3.0}, {**line, "sample": 1, "response": "a dog", "score": 1.0}
    rows = [pair_row(better, worse, [{"bytes": picture(), "path": None}], lineage)] * 5
    write_pairs(rows, Store(str(place / "pairs" / "rows")))
    right = {f"held_out.jsonl:{k}": {"accuracy/likelihood": value} for k, value in enumerate(RIGHT[number])}
    (place / "train" / "held_out_scores.json").write_text(json.dumps(right))
    (place / "train" / "metrics.jsonl").write_text(json_lines([{"step": 0, "eval_accuracy/likelihood": 0.25}, {"step": 9}]))
    return Round(
        number=number,
        policy="start",
        seed=7,
        prompts=2,
        responses=3,
        mean_score=2.0,
        pairs=5,
        left_out={"prompts without a pair": 1},
        model="model",
        metrics={"steps": 9, "eval_accuracy/likelihood": sum(RIGHT[number]) / 4},
    )


@pytest.fixture
def rounds(tmp_path: Path) -> list[Round]:
    return [made_round(tmp_path, number) for number in (1, 2)]


def test_the_page_has_each_rounds_accuracy_scores_counts_and_pairs(tmp_path: Path, rounds: list[Round]) -> None:
    page = page_of(Store(str(tmp_path)), rounds, flags=FLAGS)
    assert page.start["accuracy/likelihood"].words == "0.250"
    first, second = page.rounds
    cells = [one.accuracies["accuracy/likelihood"] for one in page.rounds]
    assert [cell.value for cell in cells] == [0.5, 0.75]
    assert all(cell.low is not None and cell.low < (cell.value or 0) < (cell.high or 0) for cell in cells)
    assert first.change == ""
    assert second.change == "2 records won, 1 lost (p = 1)"
    assert second.scores == [3.0, 1.0, 2.0]
    assert (second.chosen_scores, second.rejected_scores) == ([3.0] * 5, [1.0] * 5)
    assert second.counts == {"prompts": 2, "responses": 3, "pairs": 5, "steps": 9}
    assert second.left_out == {"prompts without a pair": 1, "dropped: image missing": 1}
    assert len(second.shown) == 3
    text = render_rounds(page)
    assert "Round 2 of 3 is done." in text
    assert "2 records won, 1 lost" in text
    assert text.count("data:image/jpeg;base64,") == 6
    assert "a &lt;cat&gt;" in text
    assert "Be &lt;i&gt;brief&lt;/i&gt;." in text
    assert "python=&lt;b&gt;:f" in text
    assert "<script" not in text


def test_rounds_that_hold_out_records_of_their_own_are_not_compared(tmp_path: Path, rounds: list[Round]) -> None:
    page = page_of(Store(str(tmp_path)), rounds, flags={**FLAGS, "val_dataset": (), "num_rounds": 2})
    assert [one.change for one in page.rounds] == ["", ""]
    assert page.start == {}
    text = render_rounds(page)
    assert "rounds do not compare" in text
    assert "is done." not in text


def test_rounds_go_on_without_a_page_that_cannot_be_made(
    tmp_path: Path, rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Store(str(tmp_path))
    write_results(folder, rounds, flags=FLAGS)
    assert (tmp_path / PAGE).read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "round_1" / "train" / "held_out_scores.json").unlink()
    with caplog.at_level(logging.WARNING):
        write_results(folder, rounds[:1], flags=FLAGS)
    assert "The report could not be written" in caplog.text
    assert json.loads((tmp_path / ROUNDS).read_text()) == [dataclasses.asdict(rounds[0])]
