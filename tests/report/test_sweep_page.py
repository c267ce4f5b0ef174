"""The page of a sweep."""

import re
from typing import Any

import pytest

from rayalign.report.drawn_trial import DrawnTrial
from rayalign.report.sweep_page import (
    DrawnSweep,
    frontier,
    frontier_section,
    importance_section,
    parallel_section,
    places,
    render_sweep,
    stopped_section,
)


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


def test_a_range_is_drawn_by_its_logarithm_where_its_values_were():
    assert places([0.01, 0.1, 1], is_log=False) == pytest.approx([0, 0.0909, 1], abs=1e-4)
    assert places([1, 2, 4], is_log=True) == pytest.approx([0, 0.5, 1])
    trials = [trial(str(beta), 0.5, beta=beta) for beta in (1.0, 2.0, 4.0)]
    assert parallel_section(trials, "eval_m", is_log={"beta": True}) != parallel_section(trials, "eval_m")


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
    page = render_sweep(
        DrawnSweep(
            title="<sweep>",
            metric="eval_m",
            mode="max",
            words="Ranked.",
            heads=["trial", "beta"],
            rows=rows,
            trials=TRIALS,
            importance={"<flag>": 0.5},
            cost_name="eval_drift",
        )
    )
    assert page.startswith("<!DOCTYPE html>")
    assert "<td>&lt;b&gt;</td>" in page
    assert "&lt;sweep&gt;" in page
    assert "&lt;sigmoid&gt;" in page
    assert "<sigmoid>" not in page
    assert "&lt;flag&gt;" in page
    assert page.count("<figure") == 2
    assert "<script" not in page


def costly(name: str, value: float, cost: float, state: str = "finished") -> DrawnTrial:
    return DrawnTrial(name, state, {}, value, [(1, value)], cost)


COSTLY = [
    costly("Trial 1 (a)", 0.9, 5.0),
    costly("Trial 2 (b)", 0.8, 2.0),
    costly("Trial 3 (c)", 0.7, 3.0),  # 2 is better, and cheaper
    costly("Trial 4 (d)", 0.5, 1.0),
    costly("Trial 5 (e)", 0.9, 0.1, "stopped"),
]


def test_the_frontier_has_the_finished_trials_that_none_beats_in_both():
    assert [t.short_name for t in frontier(COSTLY, mode="max")] == ["Trial 4", "Trial 2", "Trial 1"]
    assert [t.short_name for t in frontier(COSTLY, mode="min")] == ["Trial 4"]


def test_each_trial_is_a_dot_of_value_and_cost_and_those_of_the_frontier_have_their_numbers():
    markup = frontier_section(COSTLY, "eval_m", "eval_drift", mode="max")
    assert re.findall(r'class="point (\w+)"', markup) == ["blue", "blue", "grey", "blue", "orange"]
    assert re.findall(r'<text class="tick halo"[^>]*>(\d)', markup) == ["1", "2", "4"]
    assert frontier_section([trial("a", 0.5)], "eval_m", "eval_drift", mode="max") == ""


def test_a_stopped_trial_is_told_with_its_step_and_its_place_there():
    trials = [
        DrawnTrial("Trial 1", "finished", {}, 0.9, [(2, 0.6), (4, 0.9)]),
        DrawnTrial("Trial 2", "stopped", {}, 0.5, [(2, 0.5)], num_steps=4),
        DrawnTrial("Trial 3", "stopped", {}, 0.4, [(2, 0.4)], num_steps=4),
    ]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", stopped_section(trials, "eval_m", mode="max"))
    assert cells == ["Trial 2", "2 of 4", "0.5", "2 of 3", "Trial 3", "2 of 4", "0.4", "3 of 3"]
    assert stopped_section(trials[:1], "eval_m", mode="max") == ""


def test_each_flag_has_a_bar_of_its_share():
    assert re.findall(r'(\d+%)|width="([\d.]+)"', importance_section({"beta": 0.75, "rank": 0.0}, "eval_m")) == [
        ("75%", ""),
        ("", "150.0"),
        ("0%", ""),
        ("", "0.0"),
    ]
    assert importance_section({}, "eval_m") == ""


def test_words_on_axes_are_all_written_and_cut_where_there_is_no_room():
    long = "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
    words = [trial(f"Trial {k}", k / 10, modules=f"{k}-{long}", loss=f"{k}-{long}") for k in range(8)]
    markup = parallel_section(words, "eval_m")
    labels = re.findall(r'<text class="tick( end| halo)"[^>]*>(\d-[^<]*)', markup)
    assert len(labels) == 16  # each of both flags' eight words
    assert {css for css, _ in labels} == {" end", " halo"}
    assert all(label.endswith("…") and len(label) <= 60 for _, label in labels)
