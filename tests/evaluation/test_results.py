"""What an evaluation leaves behind: metrics as JSON, every record's own values, a table, and a page."""

import dataclasses
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayalign.evaluation.benchmarks.benchmark import YES_NO, Item, LeftOut, Said
from rayalign.evaluation.preferences import pairs_of
from rayalign.evaluation.questions import Answers
from rayalign.evaluation.results import (
    BenchmarkResult,
    DatasetResult,
    ModelResult,
    as_json,
    in_words,
    questions_table,
    records_table,
    table_text,
    write_results,
)
from rayalign.evaluation.results_page import page_of
from rayalign.evaluation.statistics import Estimate, estimate
from rayalign.report.evaluation_page import render_evaluation
from rayalign.storage import Store
from tests.evaluation.test_preferences import COLUMNS, IDS, table

FLAGS = {"model": "<b>a</b>", "dataset": ("pairs.jsonl",)}


def result(role: str, *, first: int = 0, text: str = "Yes") -> ModelResult:
    """A model on the records from `first` on, one of which has no score, and on a benchmark of one question and a row left
    out."""
    columns = {name: values[first:] for name, values in COLUMNS.items()}
    columns["chosen"] = [*columns["chosen"][:-1], math.nan]
    item = Item("q<1>", "Is it?", (), YES_NO, "Yes")
    benchmark = BenchmarkResult(
        name="pope",
        title="POPE",
        answers=Answers(choices={"log-probs": [Said(item, text)]}, unanswered=["gone"]),
        metrics={"log-probs": {"accuracy": Estimate(float(text == "Yes"), 0.0, 1.0, 1), "f1": 0.5}},
        num_questions=2,
        left_out=(LeftOut("pope.json, row 7", "label: expected yes or no, found 'maybe'"),),
        dropped={"image missing": 1},
    )
    pairs = pairs_of(table(columns, IDS[first:]))
    return ModelResult(role, f"<{role}>", "base", DatasetResult.of(pairs, {"broken JSON": 2}, seed=0), {"pope": benchmark})


RESULTS = (result("model"), result("compare", first=1, text="No"))


def test_all_metrics_counts_and_comparisons_are_in_the_json() -> None:
    found = as_json(RESULTS, flags=FLAGS, seed=0)
    data = found["model"]["dataset"]
    assert data["records"] == 3
    assert data["dropped"] == {"broken JSON": 2, "score is no number": 1}
    assert data["chief_scorer"] == "implicit_reward"
    assert data["metrics"]["accuracy/likelihood"]["value"] == 0.5  # margins 2, -2, 0
    assert set(data["metrics"]["accuracy/likelihood"]) == {"value", "low", "high", "records"}
    benchmark = found["compare"]["benchmarks"]["pope"]
    assert (benchmark["questions"], benchmark["unanswered"], benchmark["dropped"]) == (2, 1, {"image missing": 1})
    assert benchmark["left_out"][0]["place"] == "pope.json, row 7"
    assert found["comparison"]["dataset"]["records"] == 2
    assert found["comparison"]["benchmarks"]["pope"]["log-probs"] == {"only_first": 1, "only_second": 0, "p_value": 1.0}
    json.dumps(found, allow_nan=False)


def test_every_scored_record_and_every_question_has_a_row() -> None:
    records = records_table(RESULTS).to_pylist()
    assert [row["id"] for row in records] == list(IDS[:3])
    assert [row["margin_likelihood"] for row in records] == [2.0, -2.0, 0.0]
    assert [row["compare_margin_likelihood"] for row in records] == [None, -2.0, 0.0]
    questions = questions_table(RESULTS).to_pylist()
    told = [(row["model"], row["id"], row["way"], row["said"], row["answer"]) for row in questions]
    assert told == [
        ("model", "q<1>", "log-probs", "Yes", "Yes"),
        ("model", "gone", "unanswered", None, None),
        ("compare", "q<1>", "log-probs", "No", "Yes"),
        ("compare", "gone", "unanswered", None, None),
    ]


def test_the_table_has_both_models_and_what_was_not_evaluated() -> None:
    lines = table_text(RESULTS, seed=0).splitlines()
    assert lines[0].split() == ["metric", "[95", "%", "interval]", "model", "compare"]
    assert any(line.startswith("accuracy/likelihood ") and "0.500 [" in line for line in lines)
    assert any(line.split() == ["pope", "(log-probs):", "f1", "0.500", "0.500"] for line in lines)
    assert "model: 3 records, 3 dropped" in lines
    assert "compare: POPE: 2 questions, 1 unanswered, 1 rows left out" in lines
    assert "pope (log-probs): only the first right 1, only the second 0, McNemar p = 1" in lines


def test_the_page_shows_everything_and_trusts_nothing() -> None:
    page = render_evaluation(page_of(RESULTS, flags=FLAGS, seed=0))
    for text in ("&lt;model&gt;", "POPE", "McNemar", "Accuracy by pictures", "broken JSON", "row 7", "Length bias"):
        assert text in page, text
    assert "<b>a</b>" not in page
    assert "<compare>" not in page
    assert page.count("<svg") >= 4


def test_one_model_has_a_page_without_comparison() -> None:
    page = render_evaluation(page_of(RESULTS[:1], flags=FLAGS, seed=0))
    assert "McNemar" not in page
    assert "compare" not in as_json(RESULTS[:1], flags=FLAGS, seed=0)


def test_files_are_written(tmp_path: Path) -> None:
    write_results(Store(str(tmp_path)), RESULTS, flags=FLAGS, seed=0)
    assert json.loads((tmp_path / "metrics.json").read_text())["model"]["name"] == "<model>"
    assert pq.read_table(tmp_path / "records.parquet").num_rows == 3
    assert pq.read_table(tmp_path / "questions.parquet").num_rows == 4


def test_no_table_of_an_earlier_evaluation_stays_beside_the_metrics(tmp_path: Path) -> None:
    write_results(Store(str(tmp_path)), RESULTS, flags=FLAGS, seed=0)
    of_benchmarks = [dataclasses.replace(one, dataset=None) for one in RESULTS[:1]]
    write_results(Store(str(tmp_path)), of_benchmarks, flags=FLAGS, seed=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "questions.parquet"]


def test_a_model_without_one_usable_score_is_refused() -> None:
    pairs = pairs_of(table(COLUMNS | {"chosen": [math.nan] * 4}))
    with pytest.raises(ValueError) as caught:
        DatasetResult.of(pairs, {}, seed=0)
    assert str(caught.value) == "No record of 4 has a score that is a number. Is the model damaged?"


def test_one_record_is_shown_without_an_interval() -> None:
    assert in_words(estimate([0.25], seed=0)) == "0.250"
    assert in_words(estimate([0.25, 0.25], seed=0)) == "0.250 [0.250, 0.250]"
