"""A population of trials (PBT, https://arxiv.org/abs/1711.09846): at each evaluation the worst quarter goes on from the weights
of the best quarter, with the other's flags a little changed.

Ray Tune's scheduler says who takes over from whom; which flags may change, and how, is said here.
"""

import copy
import random
from collections.abc import Mapping
from typing import Any

import ray.tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher

from rayalign.config.flags import flags_of
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.ranking import mode_of
from rayalign.sweeps.search_space import LISTED, SearchSpace, class_of
from rayalign.sweeps.searcher import QueueSearcher
from rayalign.sweeps.trial_process import MEMBER
from rayalign.sweeps.trials import TRIALS, read_handed

RATES = ("learning_rate", "weight_decay", "max_grad_norm")
"""Flags of the optimizer that may change while a run goes on."""

DRAWN_ANEW = 0.25
"""How often a flag is drawn anew and not changed by one of FACTORS."""

FACTORS = (0.8, 1.25)


def check_population(space: SearchSpace, sweep: TuneConfig, *, apart: str | None) -> None:
    """Raises ValueError for a sweep that can't be a population; `apart` says why its trials can't share processes."""
    given = "--scheduler pbt"
    if apart is not None:
        raise ValueError(f"{given}: trials hand weights over between processes of one worker, and can't here: {apart}.")
    if sweep.search_alg != "random" or sweep.num_seeds > 1 or sweep.num_samples < 2 or sweep.max_concurrent_trials:
        raise ValueError(
            f"{given}: takes --num_samples of at least 2, --search_alg random, one seed and no --max_concurrent_trials: all "
            "trials take turns."
        )
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if value := getattr(space.base.run, name):
            raise ValueError(
                f"{given} with --{name} {str(value).lower()}: a trial goes on with another one's weights, so its evaluations "
                "are not of one run. Leave one of the two out; the sweep's model is the best trial's as it is."
            )
    own = {flag.name: flag for flag in flags_of(class_of(space.base, space.base.algorithm.name))}
    for name, values in space.ranges.items():
        may_change = name in RATES or (name in own and own[name].item_type is float and not own[name].is_list)
        if values.kind in LISTED or not may_change:
            raise ValueError(
                f"{given} with --search {name}={values.kind}: flags change while trials run, and only ranges of numbers of "
                f"{', '.join(RATES)} and the algorithm's own flags can."
            )


class Population(ray.tune.Callback):
    """The trials of a population as Ray Tune gets them, all at once, and what it tells of them."""

    def __init__(self, searcher: QueueSearcher, folder: Store) -> None:
        self._searcher = searcher
        self._names: dict[str, str] = {}
        self.members: list[dict[str, Any]] = []
        while (found := searcher.suggest(f"member {len(self.members)}")) != Searcher.FINISHED:
            lines = read_handed(folder / TRIALS / found["name"])
            self.members.append({**found, "flags": lines[-1]["flags"] if lines else found["flags"]})
        self._keys = {member["name"]: f"member {number}" for number, member in enumerate(self.members)}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any) -> None:
        self._searcher.on_trial_result(self._keys[str(trial)], dict(result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searcher.on_trial_complete(self._keys[str(trial)], trial.last_result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._searcher.on_trial_complete(self._keys[str(trial)], error=True)


def population_scheduler(space: SearchSpace, sweep: TuneConfig) -> PopulationBasedTraining:
    """Ray Tune's scheduler, with our way of changing flags."""
    generator = random.Random(sweep.search_seed)
    return PopulationBasedTraining(
        time_attr="step",
        metric=sweep.metric,
        mode=mode_of(sweep),
        perturbation_interval=space.base.run.eval_steps,
        custom_explore_fn=lambda sampled: explore(space, sampled, generator),
        log_config=False,
        require_attrs=False,
        # All wait for the last one: who takes over from whom does not depend on which trial is quicker.
        synch=True,
    )


def explore(space: SearchSpace, sampled: Mapping[str, Any], generator: random.Random) -> dict[str, Any]:
    """The settings of a trial with its flags a little changed, within their ranges."""
    changed = copy.deepcopy(dict(sampled))
    flags = changed[MEMBER]["flags"]
    algorithm = space.base.algorithm.name
    for name, values in space.ranges.items():
        low, high = float(values.values[0]), values.last
        if generator.random() < DRAWN_ANEW:
            drawn = space.draw(name, generator)
        elif values.step is not None:
            drawn = flags[name] + generator.choice((-values.step, values.step))
        else:
            drawn = flags[name] * generator.choice(FACTORS)
        flags[name] = space.value(name, algorithm, min(max(drawn, low), high))
    return changed
