"""Ray Train on the driver's side: one run from configuration to result folder; `worker` is what its TorchTrainer starts.

`run` is what pipelines call; `fit` trains on data that is already prepared, which is what the trials of a sweep do.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import transformers
from ray.train.torch import TorchTrainer

from rayalign import __version__
from rayalign.config.config import Config
from rayalign.data.encode import EncoderSpec
from rayalign.data.prepare import RunData, TooManyDropped, prepare, quiet_logging, quiet_ray
from rayalign.formats.parse import own_formats
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import resolve_model
from rayalign.policy.tuner_checks import check_attention, check_tuner
from rayalign.storage import Store
from rayalign.training.checkpoint import prune_checkpoints
from rayalign.training.run_folder import open_run, write_results

logger = logging.getLogger(__name__)

POLL_SECONDS = "0.2"
"""How often Ray Train's controller looks at its workers; a report waits for the next look (Ray's default is 2 s)."""


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

    Raises ValueError for what the user can mend: flags, data, a folder that holds another run.
    """
    assert not config.run.dry_run, "pipeline.run sees to it"
    config = with_output_dir(config)
    resolve_model(config.model, REGISTERED_MODELS)
    own_formats(config.plugins)
    start_ray(config)
    config = resolve_cluster(config)
    folder = open_run(config)
    try:
        data = prepare_run(config)
    except TooManyDropped as error:
        _write_dropped(folder, error.dropped)
        raise
    _write_dropped(folder, [line for part in (data.training, data.held_out) if part for line in part.dropped()])
    # It knows how models are loaded, which Ray Train's controller, for which this module is loaded, too, has no use for.
    from rayalign.reference.precompute import with_reference

    return fit(config, with_reference(config, data))


@contextlib.contextmanager
def ray_as_found() -> Iterator[None]:
    """Leaves Ray as it was before: what is joined or started within is left or ended, so that a caller's next run finds a
    cluster of the size that it asks for."""
    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()


def start_ray(config: Config) -> None:
    """Joins the cluster the job was submitted to or the one on this machine, or starts a local one with room for the
    workers."""
    quiet_ray()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError:
            cluster = config.cluster
            # One more than the workers take: preparation and fetches must find a place beside them.
            cpus = max(os.cpu_count() or 1, int(cluster.num_workers * cluster.cpus_per_worker) + 1)
            # Ray Train asks the dashboard whether a run that vanished still holds its resources.
            ray.init(num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)


def resolve_cluster(config: Config) -> Config:
    """The same configuration with the workers' GPUs decided; raises ValueError at once for workers that no node could ever
    hold, or that lack what --quant_bits needs."""
    cluster = config.cluster
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(has_gpus)
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": gpus}
    fits = sum(int(min(node.get(name, 0) // amount for name, amount in wanted.items() if amount)) for node in nodes)
    if fits < cluster.num_workers and not _autoscales():
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        raise ValueError(
            f"--num_workers {cluster.num_workers} with {wanted['CPU']:g} CPUs and {gpus:g} GPUs each: the cluster has room "
            f"for {fits} "
            f"({len(nodes)} nodes, the largest with {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs) and does not scale. "
            "Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
        )
    check_tuner(config.tuner, resolve_model(config.model, REGISTERED_MODELS), on_gpu=gpus > 0)
    check_attention(config.model, on_gpu=gpus > 0)
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, gpus_per_worker=gpus))


def _autoscales() -> bool:
    """Whether nodes may still join: the cluster launcher leaves its configuration on the head node, KubeRay sets a variable."""
    return Path("~/ray_bootstrap_config.yaml").expanduser().exists() or "RAY_USAGE_STATS_KUBERAY_IN_USE" in os.environ


def prepare_run(config: Config) -> RunData:
    """Encodes the training and held-out records, or finds them in the cache."""
    if not config.data.dataset:
        raise ValueError("No data given: pass --dataset with files, folders, globs or registered names.")
    source = resolve_model(config.model, REGISTERED_MODELS)
    spec = EncoderSpec(
        model=source.base,
        responses=config.algorithm.needs.responses,
        max_length=config.data.max_length,
        truncation_strategy=config.data.truncation_strategy,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    cache = cache_of(config)
    training = prepare(config.data.dataset, spec, config.data, cache, config.plugins)
    held_out = None
    if config.data.val_dataset:
        held_out = prepare(config.data.val_dataset, spec, config.data, cache, config.plugins)
    return RunData(source, spec, training, held_out)


def cache_of(config: Config) -> Store:
    """Where encoded records are kept: --cache_dir, or beside the run's folder."""
    if config.data.cache_dir:
        return Store.at(config.data.cache_dir)
    return Store.at(str(config.run.output_dir)).parent / ".rayalign_cache"


def fit(config: Config, data: RunData, *, callbacks: Sequence[Any] = ()) -> Result:
    """Trains on prepared data with a TorchTrainer and writes the results."""
    folder = Store.at(str(config.run.output_dir))
    # Ray's own memory of earlier checkpoints may be cut short by a kill; `newest_checkpoint` decides what is whole.
    (folder / "checkpoints" / "checkpoint_manager_snapshot.json").delete()
    prune_checkpoints(folder / "checkpoints", keep=1)
    started = time.time()
    cluster = config.cluster
    gpus = cluster.gpus_per_worker or 0
    make_run_config: Any = ray.train.RunConfig  # type checkers see the class of Ray Train 1 under this name
    trainer = TorchTrainer(
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
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.run.save_total_limit),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        outcome: Any = trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise _user_error(error) or error from None
    if "stopped" in outcome.return_value:
        raise outcome.return_value["stopped"]
    prune_checkpoints(folder / "checkpoints", keep=config.run.save_total_limit)
    summary = {
        **outcome.return_value["final"],
        "algorithm": config.algorithm.name,
        "steps": outcome.return_value["steps"],
        "training_records": outcome.return_value["training_records"],
        "held_out_records": outcome.return_value["held_out_records"],
        "seconds": round(time.time() - started, 1),
        "num_workers": cluster.num_workers,
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
    write_results(folder, config, data, summary, outcome.return_value["pairs"])
    logger.info("Done: %s steps in %s s; the result is in %s", summary["steps"], summary["seconds"], folder.location)
    return Result(folder, summary, outcome.return_value["final"])


def _train_loop(job: dict[Any, Any]) -> dict[str, Any]:
    quiet_logging()
    # Ray Train's controller loads this function, too; what only the workers need is imported where they run.
    from rayalign.training.worker import train_worker

    return train_worker(job["config"], job["data"])


def with_output_dir(config: Config) -> Config:
    """The same configuration with --output_dir settled: absolute, or its URL."""
    folder = config.run.output_dir or f"output/{config.algorithm.name}"
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=Store.at(folder).location))


def _write_dropped(folder: Store, dropped: Sequence[Mapping[str, Any]]) -> None:
    (folder / "dropped.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in dropped).encode())


def _user_error(error: Any) -> ValueError | FloatingPointError | None:
    """The error behind failed workers where it is one that the user can mend."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, (ValueError, FloatingPointError)):
            return cause
    return None
