"""How much of what trials differ in comes with each searched flag."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.sweeps.trials import Outcome, short

MOST_GROUPS = 4
"""A flag of more different numbers is cut into thirds, from low to high."""

LEAST_TRIALS = 4


def importance(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The share of the variance of the trials' metric that each flag explains by itself: between groups of trials with equal or
    near values of the flag, less what as many groups at random would explain (epsilon squared), 0 at least. The highest first;
    empty for fewer than `LEAST_TRIALS` trials, or where all have the same metric.

    Trials are compared at the last step to which all of them came, so that stopped ones count, too.
    """
    evaluated = [outcome for outcome in outcomes if outcome.points]
    if len(evaluated) < LEAST_TRIALS:
        return {}
    common = min(outcome.points[-1][0] for outcome in evaluated)
    values = [[value for step, value in outcome.points if step <= common] for outcome in evaluated]
    known = [(outcome.trial.setting, found[-1]) for outcome, found in zip(evaluated, values, strict=True) if found]
    names = dict.fromkeys(name for setting, _ in known for name in setting)
    shares = {name: share for name in names if (share := _explained(name, known)) is not None}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _explained(name: str, known: Sequence[tuple[Mapping[str, Any], float]]) -> float | None:
    """Of the trials that have the flag; None where it is the same in all, or each trial is a group of its own."""
    found = [(setting[name], value) for setting, value in known if name in setting]
    groups = _groups([flag for flag, _ in found])
    values = [value for _, value in found]
    within = [[value for value, group in zip(values, groups, strict=True) if group == one] for one in set(groups)]
    inner = len(values) - len(within)
    if len(within) < 2 or inner < 1:
        return None
    total = _squares(values)
    if not total:
        return None
    left = sum(map(_squares, within))
    return max(0.0, (total - left - (len(within) - 1) * left / inner) / total)


def _groups(values: Sequence[Any]) -> list[Any]:
    """For each value the group that it is in."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= MOST_GROUPS:
        return [short(value) for value in values]
    order = sorted(values)
    return [3 * order.index(value) // len(order) for value in values]


def _squares(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return sum((value - mean) ** 2 for value in values)
