"""The page of a sweep."""

import re
from typing import Any

import pytest

from rayalign.report.sweep_page import DrawnTrial, parallel_section, places, render_sweep


def trial(name: str, value: float | None, state: str = "finished", **flags: Any) -> DrawnTrial:
    return DrawnTrial(name, state, flags, value, [(1, 0.5), (2, value or 0.5)])


TRIALS = [
    trial("Trial 2 (beta=1)", 0.9, beta=1.0, loss_type="ipo"),
    trial("Trial 1 (beta=0.01)", 0.7, beta=0.01, loss_type="<sigmoid>"),
    trial("Trial 3 (beta=0.1)", 0.4, "stopped", beta=0.1, loss_type="ipo"),
    trial("Trial 4", None, "failed", beta=0.1, loss_type="ipo"),
]


@pytest.mark.parametrize(
    ("values", "heights"),
    [
        ([1, 2, 3.0], [0, 0.5, 1]),
        ([0.01, 0.1, 1], [0, 0.5, 1]),  # over a wide range by the logarithm
        ([0, 1, 100], [0, 0.01, 1]),  # which 0 has none of
        (["a", "b", "a"], [0.25, 0.75, 0.25]),
        ([None, 1, 2], [0, 0.1, 1]),  # a flag that a trial has not is below all
        ([True, False], [0.25, 0.75]),
        ([2.0, 2.0], [0.5, 0.5]),
    ],
)
def test_values_have_their_places_on_an_axis(values: list[Any], heights: list[float]):
    assert places(values) == pytest.approx(heights)


def test_each_trial_with_a_value_is_a_line_and_the_best_one_stands_out():
    markup = parallel_section(TRIALS, "eval_m")
    lines = re.findall(r'<path class="line (\w+ \w+)" d="M([^"]+)"><title>(Trial \d)', markup)
    assert [(css, name) for css, _, name in lines] == [
        ("thin orange", "Trial 3"),
        ("thin grey", "Trial 1"),
        ("marked blue", "Trial 2"),
    ]
    assert all(path.count("L") == 2 for _, path, _ in lines)  # from beta over loss_type to the metric


def test_a_flag_that_is_the_same_in_all_trials_has_no_axis():
    same = [trial("a", 0.1, beta=1.0, lora_rank=8), trial("b", 0.2, beta=2.0, lora_rank=8)]
    assert "lora_rank" not in parallel_section(same, "eval_m")
    assert parallel_section(same[:1], "eval_m") == ""


def test_the_page_has_table_lines_and_curves_and_escapes_what_it_is_given():
    rows = [["2", "<b>"], ["1", "x"]]
    page = render_sweep(title="<sweep>", metric="eval_m", words="Ranked.", heads=["trial", "beta"], rows=rows, trials=TRIALS)
    assert page.startswith("<!DOCTYPE html>")
    assert "<td>&lt;b&gt;</td>" in page
    assert "&lt;sweep&gt;" in page
    assert "&lt;sigmoid&gt;" in page
    assert "<sigmoid>" not in page
    assert page.count("<figure") == 2
    assert "<script" not in page
