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
from rayalign.training.best import GOES_ON, NOTE, Verdict, best_checkpoint, write_note
from rayalign.training.checkpoint import (
    NONE_YET,
    FetchedCheckpoint,
    checkpoint_name,
    delete_others,
    fetch,
    fetch_newest,
    load_best,
    load_checkpoint,
    prune_checkpoints,
    whole_at,
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
        self.best = load_best(checkpoint) if checkpoint else NONE_YET
        if checkpoint:
            load_checkpoint(checkpoint, policy, self.trainer.optimizer, scaler=self.trainer.scaler)
        if self.rank == 0:
            self._settle_checkpoints(checkpoint)
        self._require_held_out()
        self.held_out_pairs: dict[str, dict[str, float]] = {}
        self.metrics_log = MetricsLog(self.folder / "metrics.jsonl", start_step=self.start_step) if self.rank == 0 else None
        self.latest_metrics: dict[str, float] = {}
        for line in self.metrics_log.lines if self.metrics_log is not None else []:
            self.latest_metrics |= line
        self._say("Training %s from step %d to %d", algorithm.name.upper(), self.start_step, self.sampler.num_steps)
        if self.device.type == "cpu" and policy.dtype == torch.float32 and multiplies_bfloat16():
            self._say("This CPU multiplies in bfloat16: with --dtype bfloat16 a step takes about 0.6 of the time")
        self.progress = Progress(self.sampler.num_steps - self.start_step)

    def _settle_checkpoints(self, loaded: FetchedCheckpoint | None) -> None:
        """Marks the best one among those that earlier starts of the run left, as far as the run goes on, and deletes others
        than it and the one that was loaded. (Every worker has its own copy of that.)"""
        checkpoints = self.folder / "checkpoints"
        best = whole_at(checkpoints, self.best.step) if self.best.step is not None else None
        if best is None:
            # A later one was the best, which the run will come to again.
            (self.folder / NOTE).delete()
        else:
            write_note(self.folder, self.best, best.store.name)
        if loaded is not None:
            delete_others(checkpoints, loaded, best=best.store if best else None)

    def _require_held_out(self) -> None:
        """Raises ValueError where flags look at evaluations, of which there will be none."""
        run = self.config.run
        asked = [name for name in ("early_stopping_patience", "load_best_model_at_end") if getattr(run, name)]
        if asked and not len(self._held_out()[1]):
            raise ValueError(
                f"--{asked[0]} {getattr(run, asked[0])}: no record is held out, so nothing is evaluated. Pass --val_dataset or "
                "a higher --dataset_test_ratio, or leave the flag out."
            )

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
        events = LoopEvents(log=self._log, evaluate=self._evaluate, save=self._save, judge=self._judge)
        # A run that was killed after it stopped early stays stopped.
        last_step = (
            self.start_step
            if self.best.stops(self.config.run)
            else run_steps(
                self.trainer,
                self.sampler,
                stream,
                self.config.run,
                events,
                start_step=self.start_step,
                tokens_before=self.latest_metrics.get("num_tokens", 0),
            )
        )
        if not self.held_out_pairs:
            self._evaluate(last_step)
        stopped = self._why_stopped(last_step)
        model_step = last_step
        if self.config.run.load_best_model_at_end and self.best.step not in (None, last_step):
            model_step = self._return_to_best()
        if self.rank == 0:
            self._write_model()
            assert self.metrics_log is not None
            self.metrics_log.flush()
        return WorkerResult(
            metrics={name: value for name, value in self.latest_metrics.items() if name != "step"},
            num_steps=last_step,
            num_training_records=len(self.sampler.rows),
            num_held_out_records=len(self._held_out()[1]),
            held_out_pairs=self.held_out_pairs,
            best=self.best,
            model_step=model_step,
            stopped=stopped,
        )

    def _judge(self, step: int) -> Verdict:
        """What the evaluation just made means; rank 0 decides, which alone has every metric of a run that goes on."""
        if not self.held_out_pairs:
            return GOES_ON
        run = self.config.run
        self.best = gather(self.best.after(step, self.latest_metrics, run) if self.rank == 0 else None)[0]
        return self.best.verdict(step, run)

    def _why_stopped(self, last_step: int) -> str | None:
        if last_step == self.sampler.num_steps:
            return None
        words = f"stopped at step {last_step}: nothing better in {self.best.since} evaluations than {self.best.words}"
        self._say("%s", words.capitalize())
        return words

    def _return_to_best(self) -> int:
        """Loads the weights of the best evaluation and evaluates them, which gives its figures once more; returns its step."""
        store = gather(best_checkpoint(self.folder) if self.rank == 0 else None)[0]
        step = self.best.step
        assert step is not None
        try:
            if store is None:
                raise ValueError(f"The checkpoint of step {step} is gone.")
            with tempfile.TemporaryDirectory() as temporary:
                checkpoint = fetch(store, step, Path(temporary))
                load_checkpoint(checkpoint, self.trainer.policy, self.trainer.optimizer, scaler=self.trainer.scaler)
        except ValueError as error:
            raise ValueError(
                f"--load_best_model_at_end true: {error} Pass false, and the same command writes the model of the last step."
            ) from None
        self._say("Back to the best: %s", self.best.words)
        self._evaluate(step)
        return step

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
                write_checkpoint(
                    Path(temporary), trainer.policy, trainer.optimizer, step=step, scaler=trainer.scaler, best=self.best
                )
                checkpoint = ray.train.Checkpoint.from_directory(temporary)
            ray.train.report(
                {"step": step, **self.latest_metrics},
                checkpoint=checkpoint,
                checkpoint_dir_name=checkpoint_name(step, self.attempt),
            )
        if self.rank == 0:
            if self.best.step == step:
                write_note(self.folder, self.best, checkpoint_name(step, self.attempt))
            limit = self.config.run.save_total_limit
            prune_checkpoints(self.folder / "checkpoints", keep=limit, best=best_checkpoint(self.folder))

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
