"""Ray Train on the driver's side: one run from configuration to result folder; `worker` is what its TorchTrainer starts.

`run` is what pipelines call; `fit` trains on data that is already prepared, which is what the trials of a sweep do.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.train.torch import TorchTrainer

from rayalign import __version__
from rayalign.cluster import CHECKPOINT_LIST, free_lost_workers, give_up_share, result_of, share_of
from rayalign.config.config import Config
from rayalign.config.unused import unused_flags
from rayalign.data.prepare import RunData, TooManyDropped, prepare_run
from rayalign.formats.parse import own_formats
from rayalign.joining import start_ray
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.size import reason_for_gpus
from rayalign.models.source import require_model, resolve_model
from rayalign.nodes import NodeWatch, resolve_cluster, wait_for_cpus, wait_for_workers
from rayalign.policy.tuner_checks import check_attention, check_optimizer, check_tuner
from rayalign.report.page import Times
from rayalign.sources.whole_paths import with_whole_paths
from rayalign.storage import Store
from rayalign.training.benchmark_results import best_of
from rayalign.training.benchmarks import check_benchmarks, judge_on_cluster, judged_beside
from rayalign.training.best import best_checkpoint, is_of_benchmark
from rayalign.training.checkpoint_folder import newest_complete, prune_checkpoints
from rayalign.training.endings import beside_signals, run_reached, told_endings, with_restarts
from rayalign.training.entry import JOB, REPORTS_EVALUATIONS, train_loop
from rayalign.training.lease import Lease, held
from rayalign.training.origin import check_origin
from rayalign.training.places import check_places, require_lasting_folders
from rayalign.training.profiling import profiled_steps
from rayalign.training.run_folder import check_run_folder, open_run, write_results
from rayalign.training.run_report import dropped_lines, read_scores
from rayalign.training.run_times import Stopwatch, begin_start, end_start
from rayalign.training.sinks import check_sinks
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)

RESIZE_SECONDS = 30.0
"""How often an elastic run looks whether there is room for more workers. Nodes that come one after the other should not stop it
for each."""

SHARE = "share.txt"
"""The file among an elastic run's checkpoints that names what its newest start asks Ray for."""

LIBRARIES = ("ray", "torch", "transformers")


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


def run(config: Config, *, began: float | None = None) -> Result:
    """Prepares, trains and writes the run's folder; continues an unfinished run of the same configuration. The time of the
    whole is counted from `began` (seconds since 1970), where that was before.

    Raises ValueError for what the user can fix: flags, data, a folder that holds another run; KeyboardInterrupt and RunFailed
    with a sentence that says what is kept.
    """
    assert not config.run.dry_run, "main.run makes a plan of it"
    watch = Stopwatch(began=began)
    config.check_inputs()
    for unused in unused_flags(config):
        logger.warning("%s", unused.words)
    require_lasting_folders(config)
    config = with_whole_paths(config)
    check_sinks(config.run.report_to)
    profiled_steps(config.run.profile_steps)
    require_model(config.model, REGISTERED_MODELS)
    check_benchmarks(config)
    with told_endings(functools.partial(run_reached, config)):
        check_run_folder(config)
        with held(Store.at(str(config.run.output_dir))) as lease:
            return _run(config, watch, lease)


def _run(config: Config, watch: Stopwatch, lease: Lease) -> Result:
    own_formats(config.plugins)
    with watch.stage("ray_start"):
        config = join_cluster(config)
    give_back_share(Store.at(str(config.run.output_dir)) / "checkpoints" / SHARE)  # opening the folder may empty it
    folder = open_run(config)
    logger.info("Results will be in %s", folder.location)
    max_failures = config.cluster.max_failures
    try:
        logger.info("Data: looking at %s", " ".join(config.data.dataset))
        with watch.stage("encoding"):
            data = with_restarts(lambda: prepare_run(config), max_failures=max_failures)
    except TooManyDropped as error:
        _write_dropped(folder, error.dropped)
        raise
    _write_dropped(folder, dropped_lines(data))
    check_origin(config, data)
    wait_for_workers(config)  # again: nodes that encoding did not use may have been given back
    from rayalign.reference.precompute import with_reference  # here: it loads what models need

    with watch.stage("reference"):
        data = with_restarts(lambda: with_reference(config, data), max_failures=max_failures)
    return fit(config, data, watch=watch, lease=lease)


def join_cluster(config: Config) -> Config:
    """Joins or starts Ray and waits for the nodes that the run needs; returns the configuration with its GPUs resolved.

    Raises ValueError for workers that the cluster has no room for, or that lack what other flags need, and for paths that not
    every node sees.
    """
    start_ray(config)
    source = resolve_model(config.model, REGISTERED_MODELS)
    trust = config.model.trust_remote_code
    config = resolve_cluster(config, lambda: reason_for_gpus(source.base, trust_remote_code=trust))
    on_gpu = bool(config.cluster.gpus_per_worker)
    check_tuner(config.tuner, source, on_gpu=on_gpu)
    check_attention(config.model, on_gpu=on_gpu)
    check_optimizer(config.optimizer, on_gpu=on_gpu)
    wait_for_workers(config)
    if config.cluster.data_label_selector:
        wait_for_cpus(config)
    check_places(config)
    return config


def fit(
    config: Config,
    data: RunData,
    *,
    callbacks: Sequence[Any] = (),
    watch: Stopwatch | None = None,
    lease: Lease | None = None,
) -> Result:
    """Trains on prepared data with a TorchTrainer and writes the results, as long as the folder's `lease` holds; `watch` has
    counted what came before. `callbacks` (Ray Train's) hear of each checkpoint, and of each evaluation before the last step.

    Raises ValueError or FloatingPointError for what the user can fix.
    """
    folder = Store.at(str(config.run.output_dir))
    watch = watch or Stopwatch()
    begin_start(folder, watch)
    node_watch = NodeWatch(config)

    def check() -> None:
        if lease is not None:
            lease.check()

    def check_with_nodes() -> None:
        check()
        node_watch.check()

    fewest, most = config.cluster.fewest_workers, config.cluster.most_workers
    workers = f"{most} train worker{'' if most == 1 else 's'}" if fewest == most else f"{fewest} to {most} train workers"

    def train() -> Any:
        # The workers find the newest whole checkpoint by its hashes.
        (folder / "checkpoints" / CHECKPOINT_LIST).delete()
        logger.info("Starting %s", workers)
        trainer = _torch_trainer(config, data, folder, callbacks)
        if config.cluster.is_elastic:
            replace_share(folder / "checkpoints" / SHARE, share_of(trainer))
        try:
            return beside_signals(trainer.fit, check=check_with_nodes)
        except ray.exceptions.RayActorError:  # the controller is lost, and its workers with it
            free_lost_workers()
            give_up_share(share_of(trainer))
            raise

    def newest_step() -> int:
        newest = newest_complete(folder / "checkpoints")
        return newest.step if newest is not None else 0

    with (
        told_endings(functools.partial(run_reached, config)),
        # After the training, idle nodes may be given back: what judges needs room for one worker alone.
        judged_beside(config, judge_on_cluster(config), check=check) as benchmarks,
    ):
        outcome = with_restarts(train, max_failures=config.cluster.max_failures, progress=newest_step)
        result = result_of(outcome.return_value)
    return finish(config, data, _with_benchmarks(result, benchmarks.read(), config), watch)


def _with_benchmarks(result: WorkerResult, figures: Mapping[int, Mapping[str, float]], config: Config) -> WorkerResult:
    """What the workers know of the run and what benchmarks say of the model that it wrote."""
    metrics = {**result.metrics, **figures.get(result.model_step, {})}
    best = best_of(figures, config.run) if is_of_benchmark(config.run) else result.best
    return dataclasses.replace(result, metrics=metrics, best=best)


def give_back_share(note: Store) -> None:
    """Gives back what the start that wrote the note has asked Ray for, as it may have been killed with its controller."""
    with contextlib.suppress(FileNotFoundError):
        give_up_share(note.read_bytes().decode(errors="replace"))


def replace_share(note: Store, share: str) -> None:
    """The same, and notes what this start will ask for."""
    give_back_share(note)
    note.write_bytes(share.encode())


def finish(config: Config, data: RunData, result: WorkerResult, watch: Stopwatch) -> Result:
    """Writes what a run's folder holds beside the model that its workers have written."""
    folder = Store.at(str(config.run.output_dir))
    prune_checkpoints(folder / "checkpoints", keep=config.run.save_total_limit, best=best_checkpoint(folder))
    times = end_start(folder, watch)
    summary = _summary(config, data, result, times)
    write_results(folder, config, data, summary, read_scores(folder), times)
    logger.info("Done: %s steps in %s s; the result is in %s", summary["steps"], summary["seconds"], folder.location)
    return Result(folder, summary, result.metrics)


def _torch_trainer(config: Config, data: RunData, folder: Store, callbacks: Sequence[Any]) -> TorchTrainer:
    cluster = config.cluster
    gpus = cluster.gpus_per_worker or 0
    # On an object store, Ray Train's own files go through the calls that are tried again; a disk is its own to open.
    filesystem, path = (None, folder.location) if folder.local_path is not None else folder.resolve()
    # Type checkers see the classes of Ray Train 1 under these names.
    make_run_config: Any = ray.train.RunConfig
    make_scaling_config: Any = ray.train.ScalingConfig
    return TorchTrainer(
        train_loop,
        train_loop_config={JOB: cloudpickle.dumps((config, data)), REPORTS_EVALUATIONS: bool(callbacks)},
        scaling_config=make_scaling_config(
            num_workers=(cluster.fewest_workers, cluster.most_workers) if cluster.is_elastic else cluster.most_workers,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
            accelerator_type=cluster.accelerator_type,
            label_selector=cluster.worker_labels or None,
        ),
        run_config=make_run_config(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            # `with_restarts` starts the whole run again: Ray Train would start its workers only, whatever ended them.
            failure_config=ray.train.FailureConfig(max_failures=0),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _summary(config: Config, data: RunData, result: WorkerResult, times: Times) -> dict[str, Any]:
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
        "seconds": times.seconds,
        "stage_seconds": dict(times.stages),
        "num_workers": config.cluster.num_workers,
        "global_batch_size": config.global_batch_size,
        "data_key": data.training.store.name,
        "seed": config.optimizer.seed,
        "data_seed": config.data.data_seed,
        "versions": {"rayalign": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}},
    }


def _write_dropped(folder: Store, dropped: Sequence[Mapping[str, Any]]) -> None:
    (folder / "dropped.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in dropped).encode())
