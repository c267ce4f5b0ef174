"""How much comes with each flag."""

from typing import Any

import pytest

from rayalign.sweeps.importance import importance
from rayalign.sweeps.trials import Outcome, Trial


def outcomes(*trials: tuple[dict[str, Any], float]) -> list[Outcome]:
    return [Outcome(Trial(number, flags), "finished", points=((1, value),)) for number, (flags, value) in enumerate(trials, 1)]


def test_a_flag_that_decides_explains_all_and_another_nothing():
    # beta decides, the rank changes nothing.
    found = importance(outcomes(*(({"lora_rank": r, "beta": b}, b) for b in (0.1, 0.2) for r in (4, 8) for _ in range(2))))
    assert list(found) == ["beta", "lora_rank"]
    assert found == pytest.approx({"beta": 1.0, "lora_rank": 0.0})


def test_many_numbers_are_cut_into_low_middle_and_high_ones():
    # (0, 1), (2, 3), (4, 5): left 1.5 of 17.5, with 2 degrees between and 3 within.
    found = importance(outcomes(*(({"beta": b}, float(b)) for b in range(6))))
    assert found["beta"] == pytest.approx((17.5 - 1.5 - 2 * 1.5 / 3) / 17.5)


def test_words_are_groups_and_a_flag_is_measured_among_the_trials_that_have_it():
    simpo = [({"rlhf_type": "simpo", "simpo_gamma": g}, 0.5) for g in (0, 0, 1, 1)]
    found = importance(outcomes(*simpo, ({"rlhf_type": "dpo"}, 0.1), ({"rlhf_type": "dpo"}, 0.1)))
    assert found == {"rlhf_type": pytest.approx(1.0)}  # of gamma nothing is known: all its trials have the same value


def test_trials_are_compared_at_the_last_step_that_all_reached():
    trials = [Outcome(Trial(n, {"beta": b}), "finished", points=((1, b), (9, 0.5))) for n, b in enumerate((1, 1, 2), 1)]
    stopped = Outcome(Trial(4, {"beta": 2}), "stopped", points=((1, 2.0),))
    assert importance([*trials, stopped]) == {"beta": pytest.approx(1.0)}


def test_of_few_trials_nothing_is_said():
    assert importance(outcomes(({"beta": 1}, 0.1), ({"beta": 2}, 0.9), ({"beta": 2}, 0.9))) == {}
    assert importance(outcomes(*(({"beta": b}, 0.1) for b in (1, 2, 3, 4)))) == {}
