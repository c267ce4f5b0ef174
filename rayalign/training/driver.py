"""Ray Train on the driver's side: one run from configuration to result folder; `worker` is what its TorchTrainer starts.

`run` is what pipelines call; `fit` trains on data that is already prepared, which is what the trials of a sweep do.
"""

import functools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import transformers
from ray.train.torch import TorchTrainer

from rayalign import __version__
from rayalign.cluster import (
    CHECKPOINT_LIST,
    Stopped,
    free_lost_workers,
    quiet_logging,
    require_lasting_folder,
    resolve_cluster,
    result_of,
    start_ray,
)
from rayalign.config.config import Config
from rayalign.data.prepare import RunData, TooManyDropped, prepare_run
from rayalign.formats.parse import own_formats
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model, resolve_model
from rayalign.policy.tuner_checks import check_attention, check_tuner
from rayalign.storage import Store
from rayalign.training.best import best_checkpoint
from rayalign.training.checkpoint import newest_complete, prune_checkpoints
from rayalign.training.endings import beside_signals, hide_known_tracebacks, run_reached, told_endings, with_restarts
from rayalign.training.lease import Lease, held
from rayalign.training.origin import check_origin
from rayalign.training.run_folder import check_run_folder, dropped_lines, open_run, with_output_dir, write_results
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, what summary.json says, and of that the final metrics by the names of metrics.jsonl."""

    folder: Store
    summary: Mapping[str, Any]
    metrics: Mapping[str, float]

    @property
    def output_dir(self) -> str:
        """The run's folder: an absolute path or a URL."""
        return self.folder.location

    @property
    def model_dir(self) -> str:
        """The folder of the adapter or the weights, with the processor: a path or URL that --model takes."""
        return (self.folder / "model").location

    @property
    def report(self) -> str:
        """The path or URL of report.html."""
        return (self.folder / "report.html").location


def run(config: Config) -> Result:
    """Prepares, trains and writes the run's folder; continues an unfinished run of the same configuration.

    Raises ValueError for what the user can fix: flags, data, a folder that holds another run; KeyboardInterrupt and RunFailed
    with a sentence that says what is kept.
    """
    assert not config.run.dry_run, "main.run makes a plan of it"
    config.check_inputs()
    require_lasting_folder(config.run.output_dir)
    config = with_output_dir(config)
    require_model(config.model, REGISTERED_MODELS)
    with told_endings(functools.partial(run_reached, config)):
        check_run_folder(config)
        with held(Store.at(str(config.run.output_dir))) as lease:
            return _run(config, lease)


def _run(config: Config, lease: Lease) -> Result:
    own_formats(config.plugins)
    config = join_cluster(config)
    folder = open_run(config)
    logger.info("Results will be in %s", folder.location)
    max_failures = config.cluster.max_failures
    try:
        data = with_restarts(lambda: prepare_run(config), max_failures=max_failures)
    except TooManyDropped as error:
        _write_dropped(folder, error.dropped)
        raise
    _write_dropped(folder, dropped_lines(data))
    check_origin(config, data)
    # It loads what models need; Ray Train's controller imports this module, too, and needs none of it.
    from rayalign.reference.precompute import with_reference

    data = with_restarts(lambda: with_reference(config, data), max_failures=max_failures)
    return fit(config, data, lease=lease)


def join_cluster(config: Config) -> Config:
    """Joins or starts Ray; returns the configuration with the workers' GPUs resolved.

    Raises ValueError for workers that the cluster has no room for, or that lack what other flags need.
    """
    start_ray(config)
    config = resolve_cluster(config)
    on_gpu = bool(config.cluster.gpus_per_worker)
    check_tuner(config.tuner, resolve_model(config.model, REGISTERED_MODELS), on_gpu=on_gpu)
    check_attention(config.model, on_gpu=on_gpu)
    return config


def fit(config: Config, data: RunData, *, callbacks: Sequence[Any] = (), lease: Lease | None = None) -> Result:
    """Trains on prepared data with a TorchTrainer and writes the results, as long as the folder's `lease` holds.

    Raises ValueError or FloatingPointError for what the user can fix.
    """
    folder = Store.at(str(config.run.output_dir))
    check = lease.check if lease is not None else lambda: None
    started = time.time()
    workers = config.cluster.num_workers

    def train() -> Any:
        # The workers find the newest whole checkpoint by its hashes.
        (folder / "checkpoints" / CHECKPOINT_LIST).delete()
        logger.info("Starting %d train worker%s", workers, "" if workers == 1 else "s")
        try:
            return beside_signals(_torch_trainer(config, data, folder, callbacks).fit, check=check)
        except ray.exceptions.RayActorError:  # the controller is lost, and its workers with it
            free_lost_workers()
            raise

    def newest_step() -> int:
        newest = newest_complete(folder / "checkpoints")
        return newest.step if newest is not None else 0

    with told_endings(functools.partial(run_reached, config)):
        outcome = with_restarts(train, max_failures=config.cluster.max_failures, progress=newest_step)
    result: WorkerResult = result_of(outcome.return_value)
    prune_checkpoints(folder / "checkpoints", keep=config.run.save_total_limit, best=best_checkpoint(folder))
    summary = _summary(config, data, result, seconds=round(time.time() - started, 1))
    write_results(folder, config, data, summary, result.held_out_pairs)
    logger.info("Done: %s steps in %s s; the result is in %s", summary["steps"], summary["seconds"], folder.location)
    return Result(folder, summary, result.metrics)


def _torch_trainer(config: Config, data: RunData, folder: Store, callbacks: Sequence[Any]) -> TorchTrainer:
    cluster = config.cluster
    gpus = cluster.gpus_per_worker or 0
    make_run_config: Any = ray.train.RunConfig  # type checkers see the class of Ray Train 1 under this name
    return TorchTrainer(
        _train_loop,  # type: ignore[arg-type]  # its annotation lacks the return value that Result carries
        train_loop_config={"config": config, "data": data},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=make_run_config(
            name="checkpoints",
            storage_path=folder.location,
            # `with_restarts` starts the whole run again: Ray Train would start its workers only, whatever ended them.
            failure_config=ray.train.FailureConfig(max_failures=0),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_loop(job: dict[Any, Any]) -> WorkerResult | Stopped:
    quiet_logging()
    hide_known_tracebacks()
    # Ray Train's controller imports this module, too; what only the workers need is imported in the workers.
    from rayalign.training.worker import train_worker

    return train_worker(job["config"], job["data"])


def _summary(config: Config, data: RunData, result: WorkerResult, *, seconds: float) -> dict[str, Any]:
    """What summary.json says."""
    best = result.best
    return {
        **result.metrics,
        "algorithm": config.algorithm.name,
        "steps": result.num_steps,
        "model_step": result.model_step,
        **({"best": {name: getattr(best, name) for name in ("step", "metric", "value")}} if best.step is not None else {}),
        **({"stopped_early": result.stopped} if result.stopped else {}),
        "training_records": result.num_training_records,
        "held_out_records": result.num_held_out_records,
        "dropped_records": len(dropped_lines(data)),
        "seconds": seconds,
        "num_workers": config.cluster.num_workers,
        "global_batch_size": config.global_batch_size,
        "data_key": data.training.store.name,
        "seed": config.optimizer.seed,
        "data_seed": config.data.data_seed,
        "versions": {
            "rayalign": __version__,
            "ray": ray.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _write_dropped(folder: Store, dropped: Sequence[Mapping[str, Any]]) -> None:
    (folder / "dropped.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in dropped).encode())
