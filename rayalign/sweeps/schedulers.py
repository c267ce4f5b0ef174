"""Which of Ray Tune's schedulers stops the worse trials, and how it is set."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from rayalign.config.tune import TuneConfig
from rayalign.sweeps.ranking import mode_of
from rayalign.sweeps.search_space import SearchSpace
from rayalign.sweeps.trials import Outcome

LEAST_DRAWS, LEAST_EVALUATIONS = 4, 3
"""From so many on --scheduler auto is asha."""

REDUCTION = 3
"""Of the trials that come to a rung (the first evaluation, and each time three times as many steps) about one in so many goes
on."""


def scheduler_of(sweep: TuneConfig, space: SearchSpace, num_steps: int) -> str:
    """The scheduler that --scheduler means for trials of so many steps."""
    if sweep.scheduler != "auto":
        return sweep.scheduler
    is_drawn = any(values.is_drawn for values in space.ranges.values())
    evaluations = math.ceil(num_steps / space.base.run.eval_steps)
    fits = sweep.num_samples >= LEAST_DRAWS and sweep.num_seeds == 1 and evaluations >= LEAST_EVALUATIONS
    return "asha" if is_drawn and fits else "none"


class _Past(NamedTuple):
    """A trial of an earlier start, as schedulers look at one."""

    trial_id: str


def ray_scheduler(
    name: str, sweep: TuneConfig, *, every: int, num_steps: int, before: Iterable[Outcome] = ()
) -> TrialScheduler | None:
    """Ray Tune's scheduler of a name, for trials that are evaluated `every` so many steps; None runs all to their end. It
    compares them with those that have ended `before`, too."""
    ranking: Any = {"time_attr": "step", "metric": sweep.metric, "mode": mode_of(sweep), "grace_period": every}
    endless: Any = math.inf
    if name == "asha":
        # Without stop_last_trials a trial of more steps than most is not taken for one that has come to its end.
        longest = max(num_steps, every)
        scheduler: TrialScheduler = ASHAScheduler(**ranking, max_t=longest, reduction_factor=REDUCTION, stop_last_trials=False)
    elif name == "median":
        # No slice is ever over: a trial is not set aside for another one, as that would start its workers anew.
        scheduler = MedianStoppingRule(**ranking, min_time_slice=endless)
    else:
        return None
    for outcome in before:
        if outcome.has_ended:
            past: Any = _Past(outcome.trial.name)
            controller: Any = None
            scheduler.on_trial_add(controller, past)
            for step, value in outcome.points:
                scheduler.on_trial_result(controller, past, {"step": step, sweep.metric: value})
    return scheduler


def asha_share(num_steps: int, every: int) -> float:
    """The share of all steps that ASHA takes where one in `REDUCTION` trials goes on at each rung."""
    taken, going_on, reached = 0.0, 1.0, 0
    while reached < num_steps:
        rung = min(every if not reached else reached * REDUCTION, num_steps)
        taken += going_on * (rung - reached)
        going_on, reached = going_on / REDUCTION, rung
    return taken / num_steps


def plan_in_words(
    space: SearchSpace, sweep: TuneConfig, *, num_steps: int, gpu_hours: float | None, shared: float = 0.0
) -> str:
    """How many trials a sweep has, and the GPU hours of all, with what they cost. `gpu_hours` are those of one trial, if they
    are known; the part of it that is the reference's is `shared` by all."""

    def hours(count: float) -> list[str]:
        if gpu_hours is None:
            return []
        price, found = sweep.price_per_hour, gpu_hours * (count * (1 - shared) + shared)
        cost = "" if price is None else f" ({found * price:,.2f} at {price:g} each)"
        return [f"{found:,.1f} GPU hours{cost}"]

    settings = sweep.num_samples if sweep.search_alg == "optuna" else len(space.settings(sweep.num_samples, sweep.search_seed))
    trials = settings * sweep.num_seeds
    words = [
        f"The sweep: {trials} trials" + (f" ({settings} settings, {sweep.num_seeds} seeds)" if sweep.num_seeds > 1 else "")
    ]
    words += hours(trials)
    if scheduler_of(sweep, space, num_steps) == "asha":
        share = asha_share(num_steps, space.base.run.eval_steps)
        words.append(", ".join([f"with ASHA about {share:.0%} of the steps", *hours(trials * share)]))
    return "; ".join(words)
