"""Ray Tune: a sweep trains many times (`training.driver`) with different flags, all trials on one prepared data set, with one
reference.

Which trials there are is decided here (`search_space`, `proposals`) and what they came to is read from their folders
(`trials`), so that the same command goes on with a sweep that was cut short. Ray Tune runs them and stops the worse ones.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig
from rayalign.config.tune import TuneConfig
from rayalign.config.unused import unused_flags
from rayalign.config.yaml_files import to_yaml
from rayalign.data.prepare import cache_of, prepare_run
from rayalign.data.stream import sampler_of
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.reference.key import REFERENCE_NOTE
from rayalign.reference.precompute import with_reference
from rayalign.sources.whole_paths import with_whole_paths
from rayalign.storage import Store
from rayalign.sweeps.hparams import write_hparams
from rayalign.sweeps.in_place import why_apart
from rayalign.sweeps.population import check_population
from rayalign.sweeps.ranking import mode_of, tell_odd_mode, with_whole_names
from rayalign.sweeps.results import (
    BEST,
    BEST_MODEL,
    PAGE,
    SWEEP,
    TABLES,
    copy_model,
    page,
    ranked,
    require_best,
    saved_in_words,
    setting_lines,
    table,
    trial_lines,
    uneven_in_words,
    write_tables,
)
from rayalign.sweeps.search_checks import check_search, check_shape
from rayalign.sweeps.search_space import ALGORITHM, SearchSpace
from rayalign.sweeps.sweep_folder import check_sweep_folder, write_search
from rayalign.sweeps.trials import STOPPED_NOTE, TRIALS, Outcome, Queue, Trial, known_settings, read_outcome, trials_of
from rayalign.sweeps.tuner import OF_TUNE, tuner_of
from rayalign.training.driver import join_cluster
from rayalign.training.endings import told_endings, with_restarts
from rayalign.training.lease import held
from rayalign.training.places import require_lasting_folders
from rayalign.training.profiling import profiled_steps
from rayalign.training.sinks import check_sinks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its folder, one line per trial (best first) and the best trial's configuration."""

    output_dir: Store
    trials: tuple[Mapping[str, Any], ...]
    best: Config


def run(config: Config, sweep: TuneConfig) -> Sweep:
    """Trains the trials that its folder does not have yet, and ranks all: sweep.json, trials.csv, trials.parquet, best.yaml and
    the best one's model/.

    Raises ValueError for search spaces and folders that can't work, and where no trial finished.
    """
    config.check_inputs()
    space, sweep = check_search(config, sweep), with_whole_names(sweep)
    _check_trials(space, sweep)
    for unused in unused_flags(config):
        if unused.because not in space.ranges:
            logger.warning("%s", unused.words)
    tell_odd_mode(sweep)
    if sweep.scheduler == "pbt":
        check_population(space, sweep, apart=why_apart(space))
    _require_optuna(sweep)
    check_sinks(config.run.report_to)
    profiled_steps(config.run.profile_steps)
    if config.run.eval_benchmarks:
        raise ValueError(
            "--eval_benchmarks: trials are ranked by their held-out records, and no benchmark is evaluated beside them. Leave "
            "it out, and evaluate the best model with the verb evaluate."
        )
    require_lasting_folders(config)
    config = with_whole_paths(config)
    for model in _models_of(dataclasses.replace(space, base=config)):
        check_shape(space, require_model(model, REGISTERED_MODELS))
    folder = Store.at(str(config.run.output_dir))
    if not config.run.overwrite:
        check_sweep_folder(folder, config, sweep)
    with told_endings(functools.partial(_sweep_reached, folder)), held(folder) as lease:
        if config.run.overwrite:
            for name in (TRIALS, OF_TUNE, BEST_MODEL, *TABLES, REFERENCE_NOTE, SWEEP, BEST, PAGE):
                (folder / name).delete()
        queue = _queue(dataclasses.replace(space, base=config), sweep, folder)
        before = sum(outcome.has_ended for outcome in queue.outcomes.values())
        if before:
            logger.info("%d trials in %s have ended before", before, folder.location)
        if queue.num_waiting or (sweep.search_alg == "optuna" and before < sweep.num_samples * sweep.num_seeds):
            config = join_cluster(config)
            check_sweep_folder(folder, config, sweep)  # again: it is known now what trials compute in
            write_search(folder, config, sweep)
            logger.info("Results will be in %s", folder.location)
            space = dataclasses.replace(space, base=config)
            num_steps = _prepare(space)
            tuner_of(space, sweep, folder, queue, num_steps).fit()
            lease.check()
        return _finish(dataclasses.replace(space, base=config), sweep, folder, list(queue.outcomes.values()))


def _models_of(space: SearchSpace) -> list[ModelConfig]:
    """The one of all trials, and those that are searched."""
    values = space.ranges["model"].values if "model" in space.ranges else ()
    return [space.base.model, *(space.base.replace({"model": value}).model for value in values)]


def _require_optuna(sweep: TuneConfig) -> None:
    if sweep.search_alg == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError(
                '--search_alg optuna: Optuna is not installed. Run pip install "rayalign[tune]", or leave the flag out.'
            ) from None


def _check_trials(space: SearchSpace, sweep: TuneConfig) -> None:
    """Raises ValueError for a trial whose flags contradict each other, before anything starts."""
    for setting in space.settings(sweep.num_samples, sweep.search_seed) if sweep.search_alg == "random" else ():
        try:
            space.config(setting)
        except ValueError as error:
            values = " ".join(f"{name}={value}" for name, value in setting.items())
            raise ValueError(f"--search gives a trial with {values}, which can't be: {error}") from None


def _sweep_reached(folder: Store) -> str:
    trials = (folder / TRIALS).list()
    done = sum((trial / name).exists() for trial in trials for name in ("summary.json", STOPPED_NOTE))
    return f"with {done} trials done, which are kept; the same command (without --overwrite) goes on with the others."


def _queue(space: SearchSpace, sweep: TuneConfig, folder: Store) -> Queue:
    """The trials of a sweep: all that random ones will be, or those that Optuna has proposed and what it will."""
    seeds = {"first_seed": space.base.optimizer.seed, "num_seeds": sweep.num_seeds}

    def read(trial: Trial) -> Outcome:
        return read_outcome(folder / TRIALS / trial.name, trial, metric=sweep.metric, mode=mode_of(sweep))

    def propose(outcomes: list[Outcome]) -> list[Trial]:
        from rayalign.sweeps import proposals  # here, as Optuna is an extra

        settings = list({outcome.trial.number: outcome.trial.setting for outcome in outcomes}.values())
        more = len(settings) < sweep.num_samples
        setting = proposals.propose(space, sweep, settings, outcomes) if more else None
        return [] if setting is None else trials_of([setting], start=len(settings) + 1, **seeds)

    if sweep.search_alg == "optuna":
        return Queue(trials_of(known_settings(folder)[: sweep.num_samples], **seeds), read, propose=propose)
    return Queue(trials_of(space.settings(sweep.num_samples, sweep.search_seed), **seeds), read)


def _prepare(space: SearchSpace) -> int:
    """Prepares the data and the reference that the trials share; returns the steps of a run without the searched flags."""
    num_steps = 0
    for algorithm in space.algorithms:
        config = space.config({ALGORITHM: algorithm} if ALGORITHM in space.ranges else {})
        work = functools.partial(_prepared_steps, config)
        num_steps = max(num_steps, with_restarts(work, max_failures=config.cluster.max_failures))
    return num_steps


def _prepared_steps(config: Config) -> int:
    data = prepare_run(config)
    with_reference(config, data, several_runs=True)
    return sampler_of(config, data).num_steps


def _finish(space: SearchSpace, sweep: TuneConfig, folder: Store, outcomes: list[Outcome]) -> Sweep:
    standings = ranked(outcomes, mode=mode_of(sweep))
    seed = space.base.optimizer.seed
    write_tables(folder, standings, sweep.metric, seed=seed)
    saved = saved_in_words(outcomes, "The scheduler")
    uneven = uneven_in_words(outcomes)
    if uneven:
        logger.warning("%s", uneven)
    words = " ".join([f"Ranked by {sweep.metric} ({mode_of(sweep)}).", *(f"{more}." for more in (saved, uneven) if more)])
    (folder / PAGE).write_bytes(page(folder, standings, sweep, words).encode())
    if "tensorboard" in space.base.run.report_to:
        write_hparams(folder, outcomes, sweep.metric)
    logger.info("The sweep, best first:\n%s%s", table(standings, sweep.metric), f"\n{saved}" if saved else "")
    found = require_best(standings, sweep.metric).outcomes[0]
    best = found.trial
    # In a folder of its own, on the data that is prepared.
    config = space.config(found.flags).replace(
        {"output_dir": (folder / "best").location, "cache_dir": cache_of(space.base).location, "overwrite": False}
    )
    model = folder / TRIALS / best.name / "model"
    if not _has_model_of(folder, best):
        (folder / SWEEP).delete()  # so that a copy cut short is not taken for a whole one
        copy_model(model, folder / BEST_MODEL)
    (folder / BEST).write_bytes(to_yaml(config).encode())
    lines = trial_lines(standings, sweep.metric, seed=seed)
    settings = setting_lines(standings, sweep.metric)
    (folder / SWEEP).write_json({"metric": sweep.metric, "mode": mode_of(sweep), "trials": lines, "settings": settings})
    places = [(folder / name).location for name in (BEST, BEST_MODEL)]
    logger.info("Best: %s; its %sflags are in %s, its model in %s", best.words, "last " if found.handed else "", *places)
    return Sweep(folder, tuple(lines), config)


def _has_model_of(folder: Store, best: Trial) -> bool:
    """Whether model/ is that of this trial already."""
    if not ((folder / SWEEP).exists() and (folder / BEST_MODEL).exists()):
        return False
    trials = (folder / SWEEP).read_json_object().get("trials") or [{}]
    return bool(trials[0].get("trial") == best.name)
