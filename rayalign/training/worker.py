"""One worker of Ray Train, from loading the model to its last step: the loop, with Ray's streams, reports and checkpoints
around it."""

import functools
import logging
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from rayalign.algorithms import Algorithm
from rayalign.cluster import Stopped, outcome_of
from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.data.sampler import StepCounts, cut_micro_batches, require_partners
from rayalign.data.store import PreparedData, Rows
from rayalign.data.stream import fetch_pairs, held_out_pairs, pairs_in_order, sampler_of
from rayalign.models.registry import FAMILIES
from rayalign.policy.forward_check import check_forward
from rayalign.policy.loading import load_policy, multiplies_bfloat16
from rayalign.policy.saving import save_policy
from rayalign.progress import Progress
from rayalign.storage import Store
from rayalign.training.checkpoint import (
    FetchedCheckpoint,
    checkpoint_name,
    delete_others,
    fetch_newest,
    load_checkpoint,
    write_checkpoint,
)
from rayalign.training.distributed import gather, start_alike
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import MetricsLog
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)


def train_worker(config: Config, data: RunData) -> WorkerResult | Stopped:
    """Runs in each train worker; rank 0 writes the model.

    Returns the error where every worker meets it, and would meet it again: flags that don't fit the model, a loss that is no
    longer finite. Any other error is raised, so that Ray ends the workers that wait for this one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        worker = outcome_of(lambda: _Worker(config, data, Path(temporary)), errors=(ValueError,))
    return worker if isinstance(worker, Stopped) else outcome_of(worker.train, errors=(FloatingPointError,))


class _Worker:
    """One train worker: its share of the data, policy and optimizer, and the metrics so far."""

    def __init__(self, config: Config, data: RunData, temporary: Path) -> None:
        """Goes on from the newest whole checkpoint, which is fetched into `temporary`."""
        self.config = config
        self.data = data
        self.folder = Store.at(str(config.run.output_dir))
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.attempt = gather(uuid.uuid4().hex[:8])[0]
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.device = ray.train.torch.get_device()
        algorithm: Algorithm = config.algorithm
        self.sampler = sampler_of(config, data)
        if data.held_out and self.sampler.settings.with_partners:
            require_partners(data.held_out.num_rows, "in --val_dataset")
        checkpoint = fetch_newest(self.folder / "checkpoints", temporary)
        self.start_step = checkpoint.step if checkpoint else 0
        # Ray Data starts while the model is loaded. Batches wait: loading changes torch's default type, in all threads.
        self.tables = fetch_pairs(data.training, self.sampler, rank=self.rank, start_step=self.start_step)
        self._say("Loading %s", data.source.base)
        policy = load_policy(
            data.source,
            model=config.model,
            tuner=config.tuner,
            device=self.device,
            needs=algorithm.needs,
            spread_over_gpus=config.cluster.spreads_models,
            seed=config.optimizer.seed,
        )
        if policy.family.model_type not in FAMILIES:
            check_forward(policy, data.spec)
        start_alike(policy)
        self.trainer = Trainer(policy, algorithm, config.optimizer, num_steps=self.sampler.num_steps, rank=self.rank)
        if checkpoint:
            load_checkpoint(checkpoint, policy, self.trainer.optimizer, scaler=self.trainer.scaler)
            self._delete_others(checkpoint)
        self.held_out_pairs: dict[str, dict[str, float]] = {}
        self.metrics_log = MetricsLog(self.folder / "metrics.jsonl", start_step=self.start_step) if self.rank == 0 else None
        self.latest_metrics: dict[str, float] = {}
        for line in self.metrics_log.lines if self.metrics_log is not None else []:
            self.latest_metrics |= line
        self._say("Training %s from step %d to %d", algorithm.name.upper(), self.start_step, self.sampler.num_steps)
        if self.device.type == "cpu" and policy.dtype == torch.float32 and multiplies_bfloat16():
            self._say("This CPU multiplies in bfloat16: with --dtype bfloat16 a step takes about 0.6 of the time")
        self.progress = Progress(self.sampler.num_steps - self.start_step)

    def _delete_others(self, loaded: FetchedCheckpoint) -> None:
        """Deletes what earlier starts of the run left. Those of this start are Ray Train's to count and delete."""
        all_have_read = gather(ray.train.get_checkpoint() is None)
        if self.rank == 0 and all(all_have_read):
            delete_others(self.folder / "checkpoints", loaded)

    def train(self) -> WorkerResult:
        stream = pairs_in_order(
            self.tables,
            self.sampler,
            self.data.spec,
            rank=self.rank,
            start_step=self.start_step,
            companion=self.trainer.algorithm.needs.companion,
            pin_memory=self.device.type == "cuda",
        )
        events = LoopEvents(log=self._log, evaluate=self._evaluate, save=self._save)
        run_steps(
            self.trainer,
            self.sampler,
            stream,
            self.config.run,
            events,
            start_step=self.start_step,
            tokens_before=self.latest_metrics.get("num_tokens", 0),
        )
        if not self.held_out_pairs:
            self._evaluate(self.sampler.num_steps)
        if self.rank == 0:
            self._write_model()
            assert self.metrics_log is not None
            self.metrics_log.flush()
        return WorkerResult(
            metrics={name: value for name, value in self.latest_metrics.items() if name != "step"},
            num_steps=self.sampler.num_steps,
            num_training_records=len(self.sampler.rows),
            num_held_out_records=len(self._held_out()[1]),
            held_out_pairs=self.held_out_pairs,
        )

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.latest_metrics |= metrics
        if self.metrics_log is not None:
            self.metrics_log.append(metrics)
        step = int(metrics["step"])
        self.progress.add(step - self.start_step - self.progress.done)
        shown = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")
        figures = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        rate = ", ".join(filter(None, [f"{metrics['pairs_per_second']:.1f} pairs/s", self.progress.time_to_go]))
        self._say("Step %d/%d  %s  %s", step, self.sampler.num_steps, figures, rate)

    def _evaluate(self, step: int) -> None:
        data, rows = self._held_out()
        if not len(rows):
            return
        token_counts = data.token_counts()
        mine = cut_micro_batches(
            rows,
            token_counts,
            batch_size=self.config.optimizer.batch_size,
            max_tokens=self.config.optimizer.max_tokens_per_batch,
            packs_rows=self.sampler.settings.packs_rows,
            rank=self.rank,
            num_workers=self.num_workers,
        )
        companion = self.trainer.algorithm.needs.companion
        order = None
        if self.sampler.settings.with_partners:
            order = rows if self.data.held_out else self.sampler.held_out_order
        batches = functools.partial(held_out_pairs, data, mine, self.data.spec, companion=companion, order=order)
        metrics, pairs = self.trainer.evaluate(batches, StepCounts.of(token_counts.take(rows)))
        self.held_out_pairs = {pair_id: values for worker in gather(pairs) for pair_id, values in worker.items()}
        line = {f"eval_{name}": value for name, value in metrics.items()}
        self.latest_metrics |= line
        if self.metrics_log is not None:
            self.metrics_log.append({"step": step, **line})
        self._say("Evaluation at step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def _save(self, step: int) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = None
            if self.rank == 0:
                trainer = self.trainer
                write_checkpoint(Path(temporary), trainer.policy, trainer.optimizer, step=step, scaler=trainer.scaler)
                checkpoint = ray.train.Checkpoint.from_directory(temporary)
            ray.train.report(
                {"step": step, **self.latest_metrics},
                checkpoint=checkpoint,
                checkpoint_dir_name=checkpoint_name(step, self.attempt),
                checkpoint_upload_fn=self._upload if self.folder.local_path is None else None,
            )

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copies a checkpoint to an object store, each file again where the store fails. (To a disk Ray Train copies it.)"""
        folder = self.folder / "checkpoints" / name
        folder.upload(Path(checkpoint.path))
        filesystem, path = folder.resolve()
        return ray.train.Checkpoint(path, filesystem)

    def _write_model(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            save_policy(self.trainer.policy, Path(temporary), safe_serialization=self.config.run.safe_serialization)
            self.data.spec.processor.save_pretrained(temporary)
            (self.folder / "model").upload(Path(temporary))

    def _held_out(self) -> tuple[PreparedData, Rows]:
        if self.data.held_out:
            return self.data.held_out, np.arange(self.data.held_out.num_rows)
        return self.data.training, self.sampler.held_out

    def _say(self, message: str, *values: Any) -> None:
        if self.rank == 0:
            logger.info(message, *values)
