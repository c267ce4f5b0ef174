"""A benchmark's questions as rows, and results as answers."""

from typing import Any

import pyarrow as pa

from rayalign.evaluation.benchmarks.benchmark import YES_NO, Benchmark, Contents, Item
from rayalign.evaluation.preferences import pairs_of
from rayalign.evaluation.questions import answers_of, draw, fingerprint, metrics_of, rights, rows_of
from rayalign.evaluation.score_columns import SCHEMA
from rayalign.storage import Store

CLOSED = Item("yes", "Is it?", ("a.png",), YES_NO, "No")
THREE = Item("three", "Which?", (), ("A", "B", "C"), "C")
PAIR = Item("pair", "Describe it.", ("a.png",), ("better", "worse"))
OPEN = Item("open", "Describe it.", (b"bytes",))
ITEMS = (CLOSED, THREE, PAIR, OPEN)
FOLDER = Store("/images")


def benchmark() -> Benchmark:
    return Benchmark(
        "Twin",
        "",
        "",
        read=lambda place: Contents(ITEMS, (), place),
        of_choices=lambda said: {"right": float(sum(one.text == one.item.answer for one in said))},
        of_pairs=lambda preferred: {"margin": preferred[0].margin},
        of_texts=lambda said, shared: {"words": float(len((said[0].text or "").split()))},
        max_new_tokens=9,
    )


def test_options_stand_two_to_a_row_and_an_odd_one_beside_the_first() -> None:
    rows = rows_of(ITEMS, benchmark(), FOLDER)
    told = [
        (row["id"], row["row"]["response"], row["row"].get("rejected_response"), row["scores"], row["asks"]) for row in rows
    ]
    assert told == [
        ("yes#0", "Yes", "No", "options", 9),
        ("three#0", "A", "B", "options", 9),
        ("three#1", "C", "A", "options", 0),
        ("pair#0", "better", "worse", "pair", 0),
        ("open#0", ".", None, "", 9),
    ]
    assert rows[0]["row"]["images"] == ["a.png"]
    assert rows[0]["folder"] == "/images"


def line(**values: Any) -> dict[str, Any]:
    return {"text": None, "chosen": None, "rejected": None} | values


LINES = {
    "yes#0": line(chosen=-1.0, rejected=-2.0, text="no, it is not"),
    "three#0": line(chosen=-3.0, rejected=-4.0, text="The answer is C"),
    "three#1": line(chosen=-2.5, rejected=-3.0),
    "open#0": line(text="two words"),
}


def pair_results() -> Any:
    lines = [{"id": "pair#0", "chosen": -1.0, "rejected": -3.0, "chosen_tokens": 1, "rejected_tokens": 2}]
    return pairs_of(pa.Table.from_pylist(lines, schema=pa.schema([("id", pa.string()), *SCHEMA])))


def test_the_likeliest_option_and_the_models_own_words_are_both_answers() -> None:
    answers = answers_of(ITEMS, LINES, pair_results())
    assert [(said.item.id, said.text) for said in answers.choices["log-probs"]] == [("yes", "Yes"), ("three", "C")]
    assert [(said.item.id, said.text) for said in answers.choices["text"]] == [("yes", "No"), ("three", "C")]
    assert answers.preferred["likelihood"][0].margin == 2.0
    assert answers.preferred["per_token"][0].margin == 0.5  # -1 and -3 / 2
    assert answers.unanswered == []
    found = metrics_of(benchmark(), Contents(ITEMS, (), FOLDER), answers)
    assert found == {
        "log-probs": {"right": 1.0},
        "text": {"right": 2.0, "words": 2.0},
        "likelihood": {"margin": 2.0},
        "per_token": {"margin": 0.5},
    }
    assert rights(benchmark(), answers) == {
        "log-probs": {"yes": 0.0, "three": 1.0},
        "text": {"yes": 1.0, "three": 1.0},
        "likelihood": {"pair": 1.0},
        "per_token": {"pair": 1.0},
    }


def test_the_values_of_a_reward_model_are_no_log_probs() -> None:
    lines = {"yes#0": line(chosen=0.5, rejected=2.0, is_reward_model=True)}
    assert [(way, said[0].text) for way, said in answers_of((CLOSED,), lines, None).choices.items()] == [("reward_model", "No")]


def test_a_question_that_gave_no_result_is_named_as_unanswered() -> None:
    lines = {name: found for name, found in LINES.items() if name not in ("three#1", "open#0")}
    lines["yes#0"] = line(chosen=float("nan"), rejected=-2.0, text="no")
    answers = answers_of((CLOSED, THREE, OPEN), lines, None)
    assert answers.unanswered == ["yes", "three", "open"]
    assert answers.choices == {}


def test_a_draw_of_questions_is_the_same_each_time_and_in_their_order() -> None:
    items = [Item(str(number), "?") for number in range(100)]
    drawn = draw(items, 10, seed=1)
    assert drawn == draw(items, 10, seed=1)
    assert drawn != draw(items, 10, seed=2)
    numbers = [int(item.id) for item in drawn]
    assert numbers == sorted(numbers)
    assert draw(items, None, seed=1) == tuple(items)
    assert draw(items, 200, seed=1) == tuple(items)


def test_questions_that_a_metric_looks_at_together_are_drawn_together() -> None:
    items = [Item(f"{number}/{part}", "?", unit=f"set {number}") for part in "abc" for number in range(20)]
    drawn = draw(items, 10, seed=1)
    assert len(drawn) == 9
    assert all(sum(item.unit == other.unit for other in drawn) == 3 for item in drawn)
    assert len(draw(items, 2, seed=1)) == 3  # at least one set


def test_other_questions_have_another_fingerprint() -> None:
    rows = rows_of(ITEMS, benchmark(), FOLDER)
    assert fingerprint(rows) == fingerprint(rows_of(ITEMS, benchmark(), FOLDER))
    assert fingerprint(rows) != fingerprint(rows[:-1])
