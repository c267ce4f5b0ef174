"""What Ray Tune's schedulers are told of the trials that ended before a restart."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ray.tune.schedulers import TrialScheduler

from rayalign.config.tune import TuneConfig
from rayalign.sweeps.schedulers import ray_scheduler
from rayalign.sweeps.trials import Outcome, State, Trial

SWEEP = TuneConfig(metric="eval_m")


class New(NamedTuple):
    """A trial as schedulers look at it."""

    trial_id: str = "new"


def past(number: int, value: float, state: State = "finished") -> Outcome:
    return Outcome(Trial(number, {"beta": number}), state, points=((2, value), (4, value)))


def decision(name: str, before: list[Outcome], value: float, sweep: TuneConfig = SWEEP) -> str:
    """What a new trial is told at its first evaluation."""
    scheduler: Any = ray_scheduler(name, sweep, every=2, num_steps=8, before=before)
    trial: Any = New()
    # Another trial waits for its turn, which is no reason to set this one aside.
    controller: Any = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    scheduler.on_trial_add(controller, trial)
    return str(scheduler.on_trial_result(controller, trial, {"step": 2, "num_steps": 8, "eval_m": value}))


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_is_compared_with_those_that_ended_before_a_restart(name: str):
    before = [past(number, 0.5 + number / 10) for number in range(4)]
    assert decision(name, before, 0.4) == TrialScheduler.STOP
    assert decision(name, before, 0.9) == TrialScheduler.CONTINUE
    assert decision(name, [], 0.4) == TrialScheduler.CONTINUE


def test_a_low_value_is_good_where_the_mode_says_so():
    before = [past(number, 0.5 + number / 10) for number in range(4)]
    low = TuneConfig(metric="eval_m", mode="min")
    assert decision("asha", before, 0.4, low) == TrialScheduler.CONTINUE
    assert decision("asha", before, 0.9, low) == TrialScheduler.STOP


def test_trials_that_go_on_are_not_compared_with_themselves():
    before = [past(1, 0.9, "unfinished"), past(2, 0.9, "failed")]
    assert decision("asha", before, 0.4) == TrialScheduler.CONTINUE


def test_without_a_scheduler_all_run_to_their_end():
    assert ray_scheduler("none", SWEEP, every=2, num_steps=8) is None
