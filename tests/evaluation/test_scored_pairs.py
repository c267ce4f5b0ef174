"""Pairs under scorers: a line for each, or why there is none."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from rayalign.algorithms import SFT
from rayalign.config.config import Config
from rayalign.data.rows import Sources
from rayalign.evaluation.exams import answers_in, read_exam
from rayalign.evaluation.questions import metrics_of
from rayalign.evaluation.score_columns import scored_schema
from rayalign.evaluation.scored_pairs import make_work
from rayalign.evaluation.scorers.by_function import function_scorer
from rayalign.formats.records import RecordError
from tests.evaluation.benchmarks.twins import values, write_lines
from tests.tiny_models import noise_image

RULES = """
def length(rows):
    return [len(row["response"]) for row in rows]


def vowels(rows):
    return [None if "?" in row["response"] else sum(letter in "aeiou" for letter in row["response"]) for row in rows]
"""
NOWHERE = Sources((), None, False)


def score(tmp_path: Path, rows: list[dict[str, Any]], *functions: str) -> list[Any]:
    (tmp_path / "rules.py").write_text(RULES)
    scorers = [function_scorer(f"{tmp_path / 'rules.py'}:{name}") for name in functions]
    return list(make_work(Config(SFT()), NOWHERE, scorers)(rows))


def test_each_scorer_scores_both_sides_of_a_pair(tmp_path: Path) -> None:
    pair = {"query": "Which?", "response": "a bee", "rejected_response": "no"}
    rows = [{"id": f"r{n}", "folder": str(tmp_path), "row": row} for n, row in enumerate([pair, pair | {"images": ["a.png"]}])]
    (tmp_path / "a.png").write_bytes(noise_image(8, 8))
    expected = {
        "python_1/chosen": 5.0,
        "python_1/rejected": 2.0,
        "python_2/chosen": 3.0,
        "python_2/rejected": 1.0,
        "chosen_characters": 5,
        "rejected_characters": 2,
        "chosen_judgements": None,
        "rejected_judgements": None,
    }
    found = score(tmp_path, rows, "length", "vowels")
    assert found == [[expected | {"num_images": 0}], [expected | {"num_images": 1}]]
    pa.Table.from_pylist([line for (line,) in found], schema=scored_schema(("python_1", "python_2")))


def test_what_is_no_pair_and_what_has_no_score_costs_only_itself(tmp_path: Path) -> None:
    rows = [
        {"query": "Which?", "response": "a bee", "rejected_response": "no"},
        {"query": "Which?", "response": "a bee"},
        {"query": "Which?", "response": "a bee", "rejected_response": "what?"},
        {"response": "a bee", "rejected_response": "no"},
        {"query": "Which?", "response": "ox", "rejected_response": "no"},
    ]
    given = [{"id": f"r{n}", "folder": str(tmp_path), "row": row} for n, row in enumerate(rows)]
    first, alone, unscored, unasked, last = score(tmp_path, given, "length", "vowels")
    assert first[0]["python_2/chosen"] == 3.0
    assert (last[0]["python_2/chosen"], last[0]["python_2/rejected"]) == (1.0, 1.0)
    for error, reason in ((alone, "missing field"), (unscored, "no score"), (unasked, "missing field")):
        assert isinstance(error, RecordError)
        assert error.reason == reason


def test_a_reward_benchmark_has_its_metrics_of_a_scorer(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    rows = [("wildvision-1", "longer", "no", [0, 1]), ("RLAIF-2", "no", "longer", [0, 1]), ("mmmu-3", "a", "abc", [1, 0])]
    lines = [
        {"id": own, "query": "Which?", "response": [one, other], "human_ranking": ranking, "image": "a.png"}
        for own, one, other, ranking in rows
    ]
    write_lines(bench / "bench.jsonl", lines)
    (bench / "a.png").write_bytes(noise_image(8, 8))
    exam = read_exam("vl_rewardbench", str(bench), image_root=None, max_questions=None, seed=0)
    found = [
        line | {"id": row["id"]} for row, (line,) in zip(exam.rows, score(tmp_path, list(exam.rows), "length"), strict=True)
    ]
    table = pa.Table.from_pylist(found, schema=pa.schema([("id", pa.string()), *scored_schema(("python",))]))
    (metrics,) = metrics_of(exam.benchmark, exam.contents, answers_in(exam, table)).values()
    # The longer one is right in the first and the third.
    expected = {"accuracy": 2 / 3, "accuracy/macro": 2 / 3}
    assert values(metrics) == expected | {"accuracy/general": 1, "accuracy/hallucination": 0, "accuracy/reasoning": 1}
