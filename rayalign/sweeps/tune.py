"""Ray Tune: a sweep trains many times (`training.driver`) with different flags, all trials on one prepared data set, with one
reference."""

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from rayalign.cluster import HEAD_NODE, quiet_logging, set_ray_variables
from rayalign.config.config import Config
from rayalign.config.sections import TuneConfig
from rayalign.config.yaml_files import to_yaml
from rayalign.data.prepare import cache_of, prepare_run
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.reference.key import REFERENCE_NOTE
from rayalign.reference.precompute import with_reference
from rayalign.storage import Store
from rayalign.sweeps.search_space import SearchRange, check_search
from rayalign.training.driver import fit, join_cluster
from rayalign.training.endings import told_endings, with_restarts
from rayalign.training.lease import STALE_SECONDS, held
from rayalign.training.origin import check_origin
from rayalign.training.places import require_lasting_folders, with_whole_paths
from rayalign.training.profiling import profiled_steps
from rayalign.training.run_folder import open_run
from rayalign.training.sinks import check_sinks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its folder, one line per trial (best first) and the best trial's configuration."""

    output_dir: Store
    trials: tuple[Mapping[str, Any], ...]
    best: Config


def run(config: Config, sweep: TuneConfig) -> Sweep:
    """Trains one trial per sampled configuration; writes sweep.json and best.yaml, and continues an unfinished sweep.

    Raises ValueError for search spaces and folders that can't work, RuntimeError where every trial failed.
    """
    config.check_inputs()
    ranges = check_search(config, sweep)
    check_sinks(config.run.report_to)
    profiled_steps(config.run.profile_steps)
    require_lasting_folders(config)
    config = with_whole_paths(config)
    require_model(config.model, REGISTERED_MODELS)
    folder = Store.at(str(config.run.output_dir))
    if (folder / "sweep.json").exists() and not config.run.overwrite:
        raise ValueError(
            f"--output_dir {folder.location} holds a finished sweep. Pass --overwrite true, or another --output_dir."
        )
    with told_endings(functools.partial(_sweep_reached, folder)), held(folder) as lease:
        if config.run.overwrite:
            for name in ("trials", "tune", REFERENCE_NOTE, "sweep.json", "best.yaml"):
                (folder / name).delete()
        config = join_cluster(config)
        logger.info("Results will be in %s", folder.location)
        with_restarts(
            lambda: with_reference(config, prepare_run(config), several_runs=True), max_failures=config.cluster.max_failures
        )
        outcome = _tuner(config, sweep, ranges, folder).fit()
        lease.check()
        return _finish(config, sweep, ranges, folder, outcome)


def _sweep_reached(folder: Store) -> str:
    done = sum((trial / "summary.json").exists() for trial in (folder / "trials").list())
    return f"with {done} trials done, which are kept; the same command (without --overwrite) goes on with the others."


def _tuner(config: Config, sweep: TuneConfig, ranges: Mapping[str, SearchRange], folder: Store) -> ray.tune.Tuner:
    trial = ray.tune.with_parameters(run_trial, config=config)
    # A trial's own process only waits for its workers: no CPU, on the head node, so that it can't take a worker's place.
    trainable = ray.tune.with_resources(trial, {"CPU": 0, HEAD_NODE: 0.001})
    if ray.tune.Tuner.can_restore((folder / "tune").location):
        logger.info("Continuing the unfinished sweep in %s", folder.location)
        return ray.tune.Tuner.restore((folder / "tune").location, trainable=trainable, resume_errored=True)
    return ray.tune.Tuner(
        trainable,
        param_space={name: _to_ray(values) for name, values in ranges.items()},
        tune_config=ray.tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=sweep.num_samples if any(values.is_drawn for values in ranges.values()) else 1,
            max_concurrent_trials=sweep.max_concurrent_trials or _trials_that_fit(config),
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=folder.location, verbose=1),
    )


def run_trial(sampled: Mapping[str, Any], *, config: Config) -> None:
    """One trial, in a process of its own: finds the prepared data in the cache and the reference's log-probabilities beside it
    and trains; a trial started again resumes."""
    quiet_logging()
    set_ray_variables()
    name = ray.tune.get_context().get_trial_id()
    folder = Store.at(str(config.run.output_dir)) / "trials" / str(name)
    places = {"output_dir": folder.location, "cache_dir": cache_of(config).location}
    trial = config.replace({**sampled, **places, "overwrite": False, "eval_answers": 0})
    # A trial that is started again may meet the processes of its last start while they end.
    with held(folder, patience=STALE_SECONDS) as lease:
        open_run(trial)
        data = prepare_run(trial)
        check_origin(trial, data)
        fit(trial, with_reference(trial, data, several_runs=True), callbacks=[TuneReportCallback()], lease=lease)


def _to_ray(values: SearchRange) -> Any:
    match values.kind:
        case "grid":
            return ray.tune.grid_search(list(values.values))
        case "choice":
            return ray.tune.choice(list(values.values))
        case "uniform":
            return ray.tune.uniform(*values.values)
        case "loguniform":
            return ray.tune.loguniform(*values.values)


def _trials_that_fit(config: Config) -> int:
    """Trials whose workers fit the cluster side by side, with a CPU to spare; Tune itself doesn't see the workers'
    resources."""
    cluster, have = config.cluster, ray.cluster_resources()
    fits = (have.get("CPU", 1) - 1) // (cluster.num_workers * cluster.cpus_per_worker)
    if cluster.gpus_per_worker:
        fits = min(fits, have.get("GPU", 0) // (cluster.num_workers * cluster.gpus_per_worker))
    return max(1, int(fits))


def _finish(
    config: Config, sweep: TuneConfig, ranges: Mapping[str, SearchRange], folder: Store, outcome: ray.tune.ResultGrid
) -> Sweep:
    lines: list[dict[str, Any]] = []
    for result in (outcome[i] for i in range(len(outcome))):
        metrics = result.metrics or {}
        line: dict[str, Any] = {name: result.config[name] for name in ranges} if result.config else {}
        lines.append(
            {
                **line,
                sweep.metric: metrics.get(sweep.metric),
                "trial": metrics.get("trial_id"),
                "error": _first_line(result.error),
            }
        )
    worked = [line for line in lines if line[sweep.metric] is not None and line["error"] is None]
    if not worked:
        raise RuntimeError(f"Every trial of the sweep failed; the first: {lines[0]['error'] if lines else 'there was none'}")
    worked.sort(key=lambda line: float(line[sweep.metric]), reverse=sweep.mode == "max")
    trials = [*worked, *(line for line in lines if line not in worked)]
    best = config.replace({name: worked[0][name] for name in ranges})
    (folder / "best.yaml").write_bytes(to_yaml(best).encode())
    (folder / "sweep.json").write_bytes(
        (json.dumps({"metric": sweep.metric, "mode": sweep.mode, "trials": trials}, indent=2) + "\n").encode()
    )
    logger.info("%s\nBest: %s, in %s", _table(trials), {n: worked[0][n] for n in ranges}, (folder / "best.yaml").location)
    return Sweep(folder, tuple(trials), best)


def _first_line(error: Exception | None) -> str | None:
    return str(error).strip().splitlines()[-1] if error else None


def _table(lines: list[dict[str, Any]]) -> str:
    names = [name for name in lines[0] if name != "error" or any(line["error"] for line in lines)]
    rows = [names, *([f"{line[n]:.4g}" if isinstance(line[n], float) else str(line[n]) for n in names] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
