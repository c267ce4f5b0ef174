"""Optuna as the one who chooses settings: what it gets of the search space, and of the trials that have ended.

Optuna is an extra: `tune` imports this module where --search_alg asks for it.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection

from rayalign.config.tune import TuneConfig
from rayalign.sweeps.ranking import mode_of
from rayalign.sweeps.search_space import ALGORITHM, SearchSpace, Setting
from rayalign.sweeps.trials import Outcome

RANDOM_SHARE, LEAST_RANDOM, MOST_RANDOM = 0.25, 3, 10
"""Of the settings, those drawn at random before the model of the results is asked."""

ATTEMPTS = 20
"""Proposals that may equal an earlier setting before no other one is expected."""


def propose(space: SearchSpace, tune: TuneConfig, settings: Sequence[Setting], outcomes: Iterable[Outcome]) -> Setting | None:
    """The next setting after those before it, by what their trials came to: the means of their seeds' values and, with
    --cost_metric, costs. None where none is found that was not tried.

    The model is made anew for each proposal, from the results alone, so that a sweep that was cut short goes on alike.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    random_ones = min(max(int(tune.num_samples * RANDOM_SHARE), LEAST_RANDOM), MOST_RANDOM)
    # One seed for each place in the order: what is drawn at random differs from what was before.
    sampler = optuna.samplers.TPESampler(seed=tune.search_seed * 10_007 + len(settings), n_startup_trials=random_ones)
    directions = [StudyDirection.MAXIMIZE if mode_of(tune) == "max" else StudyDirection.MINIMIZE]
    directions += [StudyDirection.MINIMIZE] if tune.cost_metric else []
    study = optuna.create_study(directions=directions, sampler=sampler)
    results: dict[int, list[list[float]]] = {}
    for outcome in outcomes:
        found = [outcome.value, outcome.sizes.get(tune.cost_metric)] if tune.cost_metric else [outcome.value]
        known = [value for value in found if value is not None]
        if outcome.has_ended and len(known) == len(found):
            results.setdefault(outcome.trial.number, []).append(known)
    for number, setting in enumerate(settings, 1):
        if number in results:
            study.add_trial(_told(space, setting, [statistics.fmean(values) for values in zip(*results[number], strict=True)]))
    for _ in range(ATTEMPTS):
        setting = space.setting(_asked(space, study.ask()))
        if setting not in settings:
            return setting
    return None


def _asked(space: SearchSpace, asked: optuna.Trial) -> dict[str, Any]:
    """A word or number for each flag that the chosen algorithm has."""
    chosen: dict[str, Any] = {}
    algorithm = space.base.algorithm.name
    for name in sorted(space.ranges, key=lambda name: name != ALGORITHM):  # the algorithm decides which others there are
        if space.has(name, algorithm):
            match _distribution(space, name, algorithm):
                case CategoricalDistribution(choices=words):
                    chosen[name] = asked.suggest_categorical(name, words)
                case IntDistribution(low=low, high=high, step=step, log=log):
                    chosen[name] = asked.suggest_int(name, low, high, step=step, log=log)
                case FloatDistribution(low=first, high=last, step=width, log=log):
                    chosen[name] = asked.suggest_float(name, first, last, step=width, log=log)
        algorithm = chosen.get(ALGORITHM, algorithm)
    return chosen


def _told(space: SearchSpace, setting: Setting, values: Sequence[float]) -> optuna.trial.FrozenTrial:
    """A setting that was tried, as Optuna's own finished trial."""
    algorithm = setting.get(ALGORITHM, space.base.algorithm.name)
    distributions = {name: _distribution(space, name, algorithm) for name in setting}
    params = dict(setting)
    for name, tried in setting.items():
        if space.ranges[name].kind == "choice":
            words = space.ranges[name].values
            params[name] = next(word for word in words if space.value(name, algorithm, word) == tried)
    return optuna.trial.create_trial(params=params, distributions=distributions, values=list(values))


def _distribution(space: SearchSpace, name: str, algorithm: str) -> BaseDistribution:
    values = space.ranges[name]
    if values.kind == "choice":
        return CategoricalDistribution(values.values)
    low, is_log, step = values.values[0], values.kind == "loguniform", values.step
    if space.flag(name, algorithm).item_type is int:
        return IntDistribution(int(low), int(values.last), log=is_log, step=int(step or 1))
    return FloatDistribution(low, values.last, log=is_log, step=step)
