"""One worker of Ray Train, from loading the model to its last step: the loop, with Ray's streams, reports and checkpoints
around it."""

import functools
import logging
import math
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch

from rayalign.algorithms import Algorithm
from rayalign.cluster import Stopped, outcome_of
from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.data.sampler import StepCounts, cut_micro_batches, draw_rows, require_partners
from rayalign.data.shuffled_pictures import Pictures, shuffle_pictures
from rayalign.data.store import PreparedData, Rows
from rayalign.data.stream import fetch_pairs, held_out_pairs, pairs_in_order, sampler_of, with_pictures_of_others
from rayalign.models.registry import FAMILIES
from rayalign.policy.forward_check import check_forward
from rayalign.policy.loading import load_policy, multiplies_bfloat16
from rayalign.policy.saving import save_policy
from rayalign.progress import Progress
from rayalign.report.health import find_problems
from rayalign.report.pairs import correlation
from rayalign.storage import Store
from rayalign.training.answers import Moment, ask, sample_of
from rayalign.training.checkpoint import (
    FetchedCheckpoint,
    checkpoint_name,
    delete_others,
    fetch_newest,
    load_checkpoint,
    write_checkpoint,
)
from rayalign.training.distributed import gather, start_alike
from rayalign.training.evaluation import BY_REWARD_MODEL, BY_SUM, BY_TOKEN, CHOSEN_TOKENS, REJECTED_TOKENS, image_metrics
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import MetricsLog
from rayalign.training.run_report import Background, write_report
from rayalign.training.run_times import Stopwatch, note_workers, workers_before
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")

SHOWN_EVALUATION = tuple(
    f"eval_{name}"
    for name in (
        *("loss", BY_SUM, BY_TOKEN, BY_REWARD_MODEL, "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
        *("conditional/accuracies", "image_reliance"),
    )
)
"""What the log's line of an evaluation shows; all are in metrics.jsonl."""


def train_worker(config: Config, data: RunData) -> WorkerResult | Stopped:
    """Runs in each train worker; rank 0 writes the model.

    Returns the error where every worker meets it, and would meet it again: flags that don't fit the model, a loss that is no
    longer finite. Any other error is raised, so that Ray ends the workers that wait for this one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        worker = outcome_of(lambda: _Worker(config, data, Path(temporary)), errors=(ValueError,))
    return worker if isinstance(worker, Stopped) else outcome_of(worker.train, errors=(FloatingPointError,))


def _timed(stage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Counts the time of a worker's method as that of a stage."""

    def of_stage(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def timed(worker: "_Worker", *arguments: Any) -> None:
            with worker.watch.stage(stage):
                method(worker, *arguments)

        return timed

    return of_stage


class _Worker:
    """One train worker: its share of the data, policy and optimizer, and the metrics so far."""

    def __init__(self, config: Config, data: RunData, temporary: Path) -> None:
        """Goes on from the newest whole checkpoint, which is fetched into `temporary`."""
        self.config = config
        self.data = data
        self.folder = Store.at(str(config.run.output_dir))
        self.watch = Stopwatch(workers_before(self.folder))
        self.report = Background()
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
        with self.watch.stage("model_loading"):
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
        self.warned: set[str] = set()
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
        if self.start_step == 0:
            if self.config.run.eval_on_start:
                self._evaluate(0)
            self._answer("before")
        with self.watch.stage("training"):
            run_steps(
                self.trainer,
                self.sampler,
                stream,
                self.config.run,
                events,
                start_step=self.start_step,
                tokens_before=self.latest_metrics.get("num_tokens", 0),
            )
        if self.start_step == self.sampler.num_steps:
            self._evaluate(self.sampler.num_steps)
        self._answer("after")
        if self.rank == 0:
            self._write_model()
            assert self.metrics_log is not None
            self.metrics_log.flush()
            self.report.wait()
            note_workers(self.folder, self.watch.seconds)
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

    @_timed("evaluation")
    def _evaluate(self, step: int) -> None:
        """A pass over the held-out records; after the last step another one on their pictures shuffled."""
        data, rows = self._held_out()
        if not len(rows):
            self._report()
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
            order = np.arange(data.num_rows) if self.data.held_out else self.sampler.held_out_order
        seen: dict[int, Pictures] = {}
        batches = functools.partial(held_out_pairs, data, mine, self.data.spec, companion=companion, order=order, seen=seen)
        metrics, pairs = self.trainer.evaluate(batches, StepCounts.of(token_counts.take(rows)))
        self.held_out_pairs = _together(pairs)
        if step == self.sampler.num_steps:
            partners = shuffle_pictures(_together(seen), seed=self.config.data.data_seed)
            shuffled = self.trainer.evaluate_shuffled(with_pictures_of_others(data, mine, partners, self.data.spec))
            metrics |= image_metrics(self.held_out_pairs, _together(shuffled))
        line = {f"eval_{name}": value for name, value in metrics.items()}
        self.latest_metrics |= line
        if self.metrics_log is not None:
            self.metrics_log.append({"step": step, **line})
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in SHOWN_EVALUATION if name in line)
        self._say("Evaluation at step %d  %s", step, shown)
        self._warn(step)
        self._report()

    def _warn(self, step: int) -> None:
        """Says what looks wrong in the run so far; each thing once."""
        if self.metrics_log is None:
            return
        pairs = self.held_out_pairs.values()
        margins = [values.get("rewards/margins", values.get(BY_SUM, math.nan)) for values in pairs]
        extra_tokens = [values[CHOSEN_TOKENS] - values[REJECTED_TOKENS] for values in pairs]
        lengths = correlation(list(zip(extra_tokens, margins, strict=True)))
        problems = find_problems(
            self.metrics_log.lines,
            margins=margins,
            length_correlation=lengths,
            is_finished=step == self.sampler.num_steps,
        )
        for kind, words in problems.items():
            if kind not in self.warned:
                logger.warning("Warning: %s", words)
            self.warned.add(kind)

    def _report(self) -> None:
        """Brings the run's page up to date, beside the training."""
        if self.metrics_log is not None:
            metrics, seconds, scores = list(self.metrics_log.lines), self.watch.seconds, self.held_out_pairs

            def write() -> None:
                times = note_workers(self.folder, seconds)
                write_report(
                    self.folder,
                    self.config,
                    self.data,
                    scores,
                    metrics=metrics,
                    num_steps=self.sampler.num_steps,
                    times=times,
                )

            self.report.run(write)

    @_timed("evaluation")
    def _answer(self, moment: Moment) -> None:
        """Lets the model answer some held-out prompts by itself, for the page."""
        data, rows = self._held_out()
        sample = sample_of(rows, self.config.run.eval_answers)
        if len(sample) and self.trainer.algorithm.needs.head == "language":
            spec, policy = self.data.spec, self.trainer.policy
            ask(moment, policy, spec, data, sample, folder=self.folder, rank=self.rank, workers=self.num_workers)

    @_timed("saving")
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
            )

    @_timed("saving")
    def _write_model(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            save_policy(self.trainer.policy, Path(temporary), safe_serialization=self.config.run.safe_serialization)
            self.data.spec.processor.save_pretrained(temporary)
            (self.folder / "model").upload(Path(temporary))

    def _held_out(self) -> tuple[PreparedData, Rows]:
        """The held-out records, and the rows of them that are evaluated."""
        data, rows = self.data.training, self.sampler.held_out
        if self.data.held_out:
            data, rows = self.data.held_out, np.arange(self.data.held_out.num_rows)
        return data, draw_rows(rows, at_most=self.config.run.max_eval_records, seed=self.config.data.data_seed)

    def _say(self, message: str, *values: Any) -> None:
        if self.rank == 0:
            logger.info(message, *values)


def _together(mine: Mapping[K, T]) -> dict[K, T]:
    """The entries of all workers."""
    return {key: value for worker in gather(mine) for key, value in worker.items()}
