"""The curves of a sweep's trials."""

import itertools
import math
import re

from rayalign.report.drawn_trial import DrawnTrial
from rayalign.report.sweep_curves import NAME_HEIGHT, curves_section


def trial(number: int, *values: float, state: str = "finished") -> DrawnTrial:
    points = [(10.0 * step, value) for step, value in enumerate(values, 1)]
    return DrawnTrial(f"Trial {number} (beta={number}<)", state, {}, values[-1] if values else None, points)


def names_of(drawn: str) -> list[tuple[float, str]]:
    """The names at the ends of curves, with their heights."""
    return [(float(y), name) for y, name in re.findall(r'class="tick halo"[^>]* y="([^"]+)">([^<]+)<', drawn)]


def test_all_trials_have_a_curve_and_the_best_five_have_names_that_do_not_cover_each_other():
    best = [trial(number, 0.5, 0.9 - number / 1000) for number in range(10, 16)]
    stopped = [trial(number, 0.4, 0.3, state="stopped") for number in range(20, 70)]
    once = trial(80, 0.2, state="failed")
    drawn = curves_section([*best, *stopped, once], "eval_m")
    assert len(re.findall(r'<path class="line [^"]*" d="M[^"]*"><title>', drawn)) == 56
    assert drawn.count('<circle class="dot orange"') == 1
    assert drawn.count("line thin noisy orange") == 50
    heights = [height for height, _ in names_of(drawn)]
    assert [name for _, name in names_of(drawn)] == ["10", "11", "12", "13", "14"]
    assert all(below - above >= NAME_HEIGHT - 0.11 for above, below in itertools.pairwise(heights))
    assert "Trial 14 (beta=14&lt;)</span>" in drawn
    assert "Trial 15 (beta=15&lt;)</span>" not in drawn
    assert "the best 5 have their numbers" in drawn


def test_a_failed_trial_is_none_of_the_best_and_names_of_other_steps_stay_where_they_are():
    drawn = curves_section([trial(1, 0.5, 0.6), trial(2, 0.6, state="stopped"), trial(3, 0.5, 0.55, state="failed")], "eval_m")
    (first, second) = names_of(drawn)
    assert (first[1], second[1]) == ("1", "2")
    assert first[0] == second[0]
    assert "others, stopped or failed" in drawn


def test_few_trials_are_all_named_and_none_is_drawn_faintly():
    drawn = curves_section([trial(2, 0.5, 0.6), trial(1, 0.5, 0.4, state="stopped")], "eval_m")
    assert [name for _, name in names_of(drawn)] == ["2", "1"]
    assert "noisy" not in drawn
    assert "others" not in drawn


def test_without_two_evaluations_there_is_no_picture():
    assert curves_section([trial(1), trial(2, 0.5), trial(3, math.nan, 1e300)], "eval_m") == ""
