"""What Ray Tune gets of a sweep: the trials or who hands them out, what their processes hold, and who stops the worse ones."""

import logging
from typing import Any

import ray.tune
from ray.tune.progress_reporter import TrialProgressCallback

from rayalign.cluster import HEAD_NODE
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.concurrency import Concurrency
from rayalign.sweeps.in_place import resources_of, why_apart
from rayalign.sweeps.population import Population, population_scheduler
from rayalign.sweeps.schedulers import ray_scheduler, scheduler_of
from rayalign.sweeps.search_space import SearchSpace
from rayalign.sweeps.searcher import QueueSearcher, SweepLines
from rayalign.sweeps.trial_process import MEMBER, run_member, run_trial
from rayalign.sweeps.trials import Queue

logger = logging.getLogger(__name__)

OF_TUNE = "tune"
"""The folder of Ray Tune's own files."""

KEPT_FOR_OTHERS = 4
"""Checkpoints of each trial of a population that others may still go on from."""


class NoLines(TrialProgressCallback):
    """In the place of what Ray Tune would print of each trial, with verbose=0, too. Can go when verbose=0 prints nothing.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/utils/callback.py (`_create_default_callbacks`)
    """

    def on_trial_result(self, *of_trial: Any, **info: Any) -> None:
        return None

    def on_trial_error(self, *of_trial: Any, **info: Any) -> None:
        return None

    def on_trial_complete(self, *of_trial: Any, **info: Any) -> None:
        return None


def tuner_of(space: SearchSpace, sweep: TuneConfig, folder: Store, queue: Queue, num_steps: int) -> ray.tune.Tuner:
    """Ray Tune, ready to run the trials of a queue."""
    apart = why_apart(space)
    total = sweep.num_samples * sweep.num_seeds if sweep.search_alg == "optuna" else len(queue.outcomes)
    lines = SweepLines(queue, sweep, total=total)
    scheduler = scheduler_of(sweep, space, num_steps)
    (folder / OF_TUNE).delete()
    run_config: dict[str, Any] = {
        "name": OF_TUNE,
        "storage_path": folder.location,
        "verbose": 0,
        "failure_config": ray.tune.FailureConfig(max_failures=space.base.cluster.max_failures),
    }
    if scheduler == "pbt":
        population = Population(QueueSearcher(queue, folder, lines), folder)
        logger.info("A population of %d trials", len(population.members))
        trainable = ray.tune.with_parameters(run_member, space=space)
        return ray.tune.Tuner(
            ray.tune.with_resources(trainable, resources_of(space.base)),
            param_space={MEMBER: ray.tune.grid_search(population.members)},
            tune_config=ray.tune.TuneConfig(
                scheduler=population_scheduler(space, sweep),
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config[MEMBER]["name"],
                trial_dirname_creator=lambda trial: trial.config[MEMBER]["name"],
            ),
            run_config=ray.tune.RunConfig(
                **run_config,
                callbacks=[population, NoLines()],
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=KEPT_FOR_OTHERS),
            ),
        )
    trainable = ray.tune.with_parameters(run_trial, space=space)
    if apart is None:
        trainable = ray.tune.with_resources(trainable, resources_of(space.base))
    else:
        logger.info("Each trial starts processes of its own: %s", apart)
        # A trial's own process only waits for its workers: no CPU, on the head node, so that it can't take a worker's place.
        trainable = ray.tune.with_resources(trainable, {"CPU": 0, HEAD_NODE: 0.001})
    concurrency = Concurrency(space.base, sweep, spare_cpus=0 if apart is None else 1)
    logger.info("%d trials, %s, scheduler %s", total, concurrency.words, scheduler)
    every, before = space.base.run.eval_steps, queue.outcomes.values()
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            num_samples=total,
            max_concurrent_trials=total,  # the searcher has the limit, which may change
            search_alg=QueueSearcher(queue, folder, lines, most=concurrency.most),
            scheduler=ray_scheduler(scheduler, sweep, every=every, num_steps=num_steps, before=before),
            reuse_actors=apart is None,
        ),
        run_config=ray.tune.RunConfig(**run_config, callbacks=[NoLines()]),
    )
