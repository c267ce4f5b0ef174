"""Ray Train: one run from configuration to result folder. The driver prepares data and starts a TorchTrainer; each worker runs
`loop`.

`run` is what pipelines call; `fit` trains on data that is already prepared, which is what the trials of a sweep do.
"""

import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import transformers
from ray.train.torch import TorchTrainer

from rayalign import __version__
from rayalign.algorithms import Algorithm
from rayalign.checkpoint import checkpoint_name, load_checkpoint, newest_checkpoint, prune_checkpoints, write_checkpoint
from rayalign.config import Config
from rayalign.data import TooManyDropped, held_out_pairs, pairs_in_order, prepare
from rayalign.encode import EncoderSpec
from rayalign.loop import LoopEvents, Trainer, run_steps, start_alike
from rayalign.metrics import MetricsLog, gather
from rayalign.plan import PlanSettings, StepPlan, cut_micro_batches, totals_of
from rayalign.policy import ModelSource, load_policy, resolve_model
from rayalign.prepared import PreparedData
from rayalign.runs import open_run, write_results
from rayalign.storage import Store

logger = logging.getLogger(__name__)

POLL_SECONDS = "0.2"
"""How often Ray Train's controller looks at its workers; a report waits for the next look (Ray's default is 2 s)."""


@dataclass(frozen=True)
class RunData:
    """What a run trains and is evaluated on. `held_out` None: a part of `training` is held out."""

    source: ModelSource
    spec: EncoderSpec
    training: PreparedData
    held_out: PreparedData | None


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and what summary.json says."""

    output_dir: Store
    summary: Mapping[str, Any]


def run(config: Config) -> Result:
    """Prepares, trains and writes the run's folder; continues an unfinished run of the same configuration.

    Raises ValueError for what the user can mend: flags, data, a folder that holds another run.
    """
    config = with_output_dir(config)
    resolve_model(config.model)
    start_ray(config)
    config = settle_cluster(config)
    folder = open_run(config)
    try:
        data = prepare_run(config)
    except TooManyDropped as error:
        _write_dropped(folder, error.dropped)
        raise
    _write_dropped(folder, [line for part in (data.training, data.held_out) if part for line in part.dropped()])
    return fit(config, data)


def start_ray(config: Config) -> None:
    """Joins the cluster the job was submitted to or the one on this machine, or starts a local one with room for the
    workers."""
    _quiet_ray()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError:
            cluster = config.cluster
            # One more than the workers take: preparation and look-ups must find a place beside them.
            cpus = max(os.cpu_count() or 1, int(cluster.num_workers * cluster.cpus_per_worker) + 1)
            # Ray Train asks the dashboard whether a run that vanished still holds its resources.
            ray.init(num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)


def settle_cluster(config: Config) -> Config:
    """The same configuration with the workers' GPUs decided; raises ValueError at once for workers that no node could ever
    hold."""
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
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, gpus_per_worker=gpus))


def _autoscales() -> bool:
    """Whether nodes may still join: the cluster launcher leaves its configuration on the head node, KubeRay sets a variable."""
    return Path("~/ray_bootstrap_config.yaml").expanduser().exists() or "RAY_USAGE_STATS_KUBERAY_IN_USE" in os.environ


def prepare_run(config: Config) -> RunData:
    """Encodes the training and held-out records, or finds them in the cache."""
    if not config.data.dataset:
        raise ValueError("No data given: pass --dataset with files, folders, globs or registered names.")
    source = resolve_model(config.model)
    spec = EncoderSpec(
        model=source.base,
        with_rejected=config.algorithm.with_rejected,
        max_length=config.data.max_length,
        truncation_strategy=config.data.truncation_strategy,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    cache = cache_of(config)
    training = prepare(config.data.dataset, spec, config.data, cache)
    held_out = prepare(config.data.val_dataset, spec, config.data, cache) if config.data.val_dataset else None
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
        train_worker,  # type: ignore[arg-type]  # its annotation lacks the return value that Result carries
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
    return Result(folder, summary)


def plan_of(config: Config, data: RunData) -> StepPlan:
    """The order of the run."""
    settings = PlanSettings(
        global_batch_size=config.global_batch_size,
        batch_size=config.optimizer.batch_size,
        num_workers=config.cluster.num_workers,
        num_epochs=config.optimizer.num_train_epochs,
        max_steps=config.optimizer.max_steps,
        seed=config.data.data_seed,
        held_out_ratio=0.0 if data.held_out else config.data.dataset_test_ratio,
    )
    return StepPlan(data.training.lengths(), settings)


def train_worker(job: dict[Any, Any]) -> dict[str, Any]:
    """One train worker, from loading the model to its last step; rank 0 writes the model and returns the final figures."""
    quiet_logging()
    config: Config = job["config"]
    data: RunData = job["data"]
    worker = _Worker(config, data)
    return worker.train()


def quiet_logging() -> None:
    """In a Ray process: rayalign's own lines only, and other libraries' warnings."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayalign").setLevel(logging.INFO)
    _quiet_ray()
    transformers.utils.logging.disable_progress_bar()
    # peft asks transformers by the older of two names. https://github.com/huggingface/peft; drop this when its release uses
    # the new one.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _quiet_ray() -> None:
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class _Worker:
    """What one train worker holds: policy, plan, optimizer, and the figures on the way to the results."""

    def __init__(self, config: Config, data: RunData) -> None:
        self.config = config
        self.data = data
        self.folder = Store.at(str(config.run.output_dir))
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.attempt = gather(uuid.uuid4().hex[:8])[0]
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.device = ray.train.torch.get_device()
        algorithm: Algorithm = config.algorithm
        gpus = config.cluster.gpus_per_worker or 0
        policy = load_policy(
            data.source,
            model=config.model,
            tuner=config.tuner,
            device=self.device,
            uses_dropout=algorithm.uses_dropout,
            needs_reference=algorithm.needs_reference,
            spread_over_gpus=config.cluster.strategy == "device_map" or (config.cluster.strategy == "auto" and gpus > 1),
            seed=config.optimizer.seed,
        )
        start_alike(policy)
        self.plan = plan_of(config, data)
        self.trainer = Trainer(policy, algorithm, config.optimizer, num_steps=self.plan.num_steps, rank=self.rank)
        checkpoint = newest_checkpoint(self.folder / "checkpoints")
        self.start_step = checkpoint.step if checkpoint else 0
        if checkpoint:
            load_checkpoint(checkpoint, policy, self.trainer.optimizer)
        self.latest: dict[str, float] = {}
        self.pairs: dict[str, dict[str, float]] = {}
        self.log_file = MetricsLog(self.folder / "metrics.jsonl", start_step=self.start_step) if self.rank == 0 else None
        self._say("Training %s from step %d to %d", algorithm.name.upper(), self.start_step, self.plan.num_steps)
        self._started = time.monotonic()

    def train(self) -> dict[str, Any]:
        stream = pairs_in_order(
            self.data.training,
            self.plan,
            self.data.spec,
            rank=self.rank,
            start_step=self.start_step,
            pin_memory=self.device.type == "cuda",
        )
        events = LoopEvents(log=self._log, evaluate=self._evaluate, save=self._save)
        lines = self.log_file.lines if self.log_file is not None else []
        tokens_before = next((line["num_tokens"] for line in reversed(lines) if "num_tokens" in line), 0)
        run_steps(
            self.trainer,
            self.plan,
            stream,
            self.config.run,
            events,
            start_step=self.start_step,
            tokens_before=tokens_before,
        )
        if not self.pairs:
            self._evaluate(self.plan.num_steps)
        if self.rank == 0:
            self._write_model()
            assert self.log_file is not None
            self.log_file.flush()
        return {
            "final": self._final_metrics(),
            "steps": self.plan.num_steps,
            "training_records": len(self.plan.rows),
            "held_out_records": len(self._held_out()[1]),
            "pairs": self.pairs,
        }

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.latest |= metrics
        if self.log_file is not None:
            self.log_file.append(metrics)
        step, total = int(metrics["step"]), self.plan.num_steps
        seconds = (time.monotonic() - self._started) / max(1, step - self.start_step) * (total - step)
        shown = [
            f"{name} {metrics[name]:.4g}"
            for name in ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")
            if name in metrics
        ]
        rate = f"{metrics['pairs_per_second']:.1f} pairs/s"
        self._say("Step %d/%d  %s  %s, %.0f s to go", step, total, "  ".join(shown), rate, seconds)

    def _evaluate(self, step: int) -> None:
        data, rows = self._held_out()
        if not len(rows):
            return
        lengths = data.lengths()
        batch_size = self.config.optimizer.batch_size
        mine = cut_micro_batches(rows, lengths, batch_size=batch_size, rank=self.rank, num_workers=self.world)
        metrics, pairs = self.trainer.evaluate(held_out_pairs(data, mine, self.data.spec), totals_of(rows, lengths))
        self.pairs = {pair_id: values for worker in gather(pairs) for pair_id, values in worker.items()}
        line = {f"eval_{name}": value for name, value in metrics.items()}
        self.latest |= line
        if self.log_file is not None:
            self.log_file.append({"step": step, **line})
        self._say("Evaluation at step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def _save(self, step: int) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = None
            if self.rank == 0:
                write_checkpoint(Path(temporary), self.trainer.policy, self.trainer.optimizer, step=step)
                checkpoint = ray.train.Checkpoint.from_directory(temporary)
            ray.train.report(
                {"step": step, **self.latest}, checkpoint=checkpoint, checkpoint_dir_name=checkpoint_name(step, self.attempt)
            )

    def _write_model(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            self.trainer.policy.save(Path(temporary))
            self.data.spec.processor.save_pretrained(temporary)
            (self.folder / "model").upload(Path(temporary))

    def _held_out(self) -> tuple[PreparedData, Any]:
        if self.data.held_out:
            return self.data.held_out, np.arange(self.data.held_out.num_rows)
        return self.data.training, self.plan.held_out

    def _final_metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.latest.items() if name != "step"}

    def _say(self, message: str, *values: Any) -> None:
        if self.rank == 0:
            logger.info(message, *values)


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
