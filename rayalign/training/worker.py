"""One worker of Ray Train, from loading the model to its last step: the loop, with Ray's streams, reports and checkpoints
around it."""

import functools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch

from rayalign.algorithms import Algorithm
from rayalign.cluster import Stopped, outcome_of
from rayalign.config.config import Config
from rayalign.data.prepare import RunData
from rayalign.data.sampler import require_partners
from rayalign.data.stream import fetch_pairs, pairs_in_order, sampler_of
from rayalign.policy.loading import multiplies_bfloat16
from rayalign.policy.saving import gather_weights, save_policy
from rayalign.progress import StepProgress
from rayalign.storage import Store
from rayalign.training.answers import Moment, ask, sample_of
from rayalign.training.best import GOES_ON, NOTE, Verdict, best_checkpoint, write_note
from rayalign.training.checkpoint import (
    ALL_SHARDS,
    NONE_YET,
    FetchedCheckpoint,
    checkpoint_name,
    delete_others,
    fetch,
    fetch_newest,
    load_best,
    load_checkpoint,
    prune_checkpoints,
    trains_shards,
    whole_at,
    write_checkpoint,
)
from rayalign.training.distributed import gather
from rayalign.training.gauges import Gauges
from rayalign.training.held_out import HeldOut
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metric_names import BY_REWARD_MODEL, BY_SUM, BY_TOKEN, SHUFFLED
from rayalign.training.metrics import MetricsLog
from rayalign.training.mfu import flops_per_token, peak_tflops
from rayalign.training.profiling import StepProfiler, profiled_steps
from rayalign.training.ready import ready_policy
from rayalign.training.run_report import Background, write_report
from rayalign.training.run_times import Stopwatch, note_workers, workers_before
from rayalign.training.sinks import Reporting, reporting_of
from rayalign.training.watchdog import Watchdog
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")

SHOWN_EVALUATION = tuple(
    f"eval_{name}"
    for name in (
        *("loss", BY_SUM, BY_TOKEN, BY_REWARD_MODEL, "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
        *("conditional/accuracies", "exact_match"),
    )
)
"""What the log's line of an evaluation shows; all are in metrics.jsonl."""


def train_worker(config: Config, data: RunData, *, reports_evaluations: bool = False) -> WorkerResult | Stopped:
    """Runs in each train worker; rank 0 writes the model. `reports_evaluations`: Ray Train hears of them, too, and not only of
    checkpoints.

    Returns the error where every worker meets it, and would meet it again: flags that don't fit the model, a loss that is no
    longer finite. Any other error is raised, so that Ray ends the workers that wait for this one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        worker = outcome_of(lambda: _Worker(config, data, Path(temporary)), errors=(ValueError,))
    if isinstance(worker, Stopped):
        return worker
    return outcome_of(functools.partial(worker.train, reports_evaluations=reports_evaluations), errors=(FloatingPointError,))


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
        self.gauges = Gauges(self.folder.name, self.rank)
        self.watchdog = Watchdog(self.rank, functools.partial(logger.warning, "Warning: %s"), idle=self.gauges.idle)
        self.watchdog.start()
        self.attempt = gather(uuid.uuid4().hex[:8])[0]
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.device = ray.train.torch.get_device()
        algorithm: Algorithm = config.algorithm
        self.sampler = sampler_of(config, data)
        if data.held_out and self.sampler.settings.with_partners:
            require_partners(data.held_out.num_rows, "in --val_dataset")
        shards = config.cluster.shard_group_size or self.num_workers
        self.shard = (self.rank % shards, shards) if config.cluster.shards_models else ALL_SHARDS
        checkpoint = fetch_newest(self.folder / "checkpoints", temporary, shard=self.shard)
        self.start_step = checkpoint.step if checkpoint else 0
        # Ray Data starts while the model is loaded. Batches wait: loading changes torch's default type, in all threads.
        self.tables = fetch_pairs(data.training, self.sampler, rank=self.rank, start_step=self.start_step)
        self._say("Loading %s", data.source.base)
        with self.watch.stage("model_loading"):
            policy, fillers = ready_policy(config, data, device=self.device, rank=self.rank, say=self._say)
        num_steps = self.sampler.num_steps
        self.trainer = Trainer(policy, algorithm, config.optimizer, num_steps=num_steps, rank=self.rank, fillers=fillers)
        self.best = load_best(checkpoint) if checkpoint else NONE_YET
        if checkpoint:
            load_checkpoint(checkpoint, policy, self.trainer.optimizer, scaler=self.trainer.scaler)
        if self.rank == 0:
            self._settle_checkpoints(checkpoint)
        watched = self.watchdog.watched
        self.held_out = HeldOut(config, data, self.sampler, rank=self.rank, num_workers=self.num_workers, watched=watched)
        self._require_held_out()
        self.warned: set[str] = set()
        self.metrics_log = MetricsLog(self.folder / "metrics.jsonl", start_step=self.start_step) if self.rank == 0 else None
        self.latest_metrics: dict[str, float] = {}
        self.reporting: Reporting | None = None
        if self.metrics_log is not None:
            lines, sent = self.metrics_log.lines, self.metrics_log.sent
            for line in lines:
                self.latest_metrics |= line
            others = {"Prometheus": self.gauges}
            flags = config.to_dict()
            self.reporting = reporting_of(config.run.report_to, self.folder, flags, lines=lines, sent=sent, others=others)
        steps = (self.start_step, self.sampler.num_steps)
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self._say("Training %s from step %d to %d, on %d x %s", algorithm.name.upper(), *steps, self.num_workers, chip)
        if self.device.type == "cpu" and policy.dtype == torch.float32 and multiplies_bfloat16():
            self._say("This CPU multiplies in bfloat16: with --dtype bfloat16 a step takes about 0.6 of the time")
        every = {"evaluation": config.run.eval_steps, "saving": config.run.save_steps}
        self.progress = StepProgress(*steps, every=every)
        profiled = profiled_steps(config.run.profile_steps)
        if profiled and not set(profiled) & set(range(self.start_step + 1, self.sampler.num_steps + 1)):
            self._say("--profile_steps %s: no such step is still to come", config.run.profile_steps)
        self.profiler = StepProfiler(profiled, self.folder, rank=self.rank)
        self.flops_per_token = flops_per_token(policy)

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
        if asked and not len(self.held_out.rows):
            raise ValueError(
                f"--{asked[0]} {getattr(run, asked[0])}: no record is held out, so nothing is evaluated. Pass --val_dataset or "
                "a higher --dataset_test_ratio, or leave the flag out."
            )

    def train(self, *, reports_evaluations: bool = False) -> WorkerResult:
        stream = pairs_in_order(
            self.tables,
            self.sampler,
            self.data.spec,
            rank=self.rank,
            start_step=self.start_step,
            companion=self.trainer.algorithm.needs.companion,
            pin_memory=self.device.type == "cuda",
        )
        stream = self.watchdog.watched(stream)
        events = LoopEvents(
            log=self._log,
            evaluate=self._evaluate_and_report if reports_evaluations else self._evaluate,
            save=self._save,
            judge=self._judge,
            around_step=self._around_step,
        )
        if self.start_step == 0:
            if self.config.run.eval_on_start:
                self._evaluate(0)
            self._answer("before")
        with self.watch.stage("training"):
            # A run that was killed after it stopped early stays stopped.
            stays_stopped = self.best.stops(self.config.run)
            last_step = (
                self.start_step
                if stays_stopped
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
        self.profiler.close()
        stopped = self._why_stopped(last_step)
        model_step = last_step
        if self.config.run.load_best_model_at_end and self.best.step not in (None, last_step):
            model_step = self._return_to_best()
        elif self.start_step == last_step:
            self._evaluate(model_step)
        self._evaluate_shuffled(model_step)
        self._answer("after")
        self._write_model()
        if self.rank == 0:
            assert self.metrics_log is not None
            assert self.reporting is not None
            self.metrics_log.flush()
            self.reporting.close()
            self.report.wait()
            note_workers(self.folder, self.watch.seconds)
        self.watchdog.stop()
        return WorkerResult(
            metrics={name: value for name, value in self.latest_metrics.items() if name != "step"},
            num_steps=last_step,
            num_training_records=len(self.sampler.rows),
            num_held_out_records=len(self.held_out.rows),
            held_out_pairs=self.held_out.pairs,
            best=self.best,
            model_step=model_step,
            stopped=stopped,
        )

    def _judge(self, step: int) -> Verdict:
        """What the evaluation just made means; rank 0 decides, which alone has every metric of a run that goes on."""
        if not self.held_out.pairs:
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
                checkpoint = fetch(store, step, Path(temporary), shard=self.shard)
                load_checkpoint(checkpoint, self.trainer.policy, self.trainer.optimizer, scaler=self.trainer.scaler)
        except ValueError as error:
            raise ValueError(
                f"--load_best_model_at_end true: {error} Pass false, and the same command writes the model of the last step."
            ) from None
        self._say("Back to the best: %s", self.best.words)
        self._evaluate(step)
        return step

    @contextmanager
    def _around_step(self, step: int, pairs: int) -> Iterator[None]:
        self.profiler.before(step)
        with self.progress.step(pairs):
            yield
        self.watchdog.tick()
        self.profiler.after(step)

    def _log(self, metrics: Mapping[str, float]) -> None:
        metrics = {**metrics, **self._mfu(metrics["tokens_per_second"])}
        self._keep(metrics)
        step = int(metrics["step"])
        shown = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")
        figures = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
        if self.device.type == "cuda":
            figures += [f"{metrics['tokens_per_second']:.0f} tokens/s"]
            figures += [f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []
        figures += [self.progress.words] if self.progress.words else []
        self._say("Step %d/%d  %s", step, self.sampler.num_steps, "  ".join(figures))

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        """The share of the peak of all GPUs, where that is known and the arithmetic is the table's."""
        policy, gpus = self.trainer.policy, self.num_workers * (self.config.cluster.gpus_per_worker or 0)
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak is None or not gpus or policy.dtype not in (torch.bfloat16, torch.float16):
            return {}
        return {"mfu": tokens_per_second * self.flops_per_token / (peak * 1e12 * gpus)}

    @_timed("evaluation")
    def _evaluate(self, step: int) -> None:
        if len(self.held_out.rows):
            self.watchdog.tick()
            self._say("Evaluating %d held-out records at step %d", len(self.held_out.rows), step)
            with self.progress.pause("evaluation"):
                line = self._logged(step, self.held_out.evaluate(self.trainer))
            shown = "  ".join(f"{name} {line[name]:.4g}" for name in SHOWN_EVALUATION if name in line)
            self._say("Evaluation at step %d  %s", step, shown)
            self._warn(is_finished=False)
        self._report()

    def _evaluate_and_report(self, step: int) -> None:
        """The last evaluation is not reported: who hears of it could stop the run before its model is written."""
        self._evaluate(step)
        if step < self.sampler.num_steps and len(self.held_out.rows):
            ray.train.report({"step": step, "num_steps": self.sampler.num_steps, **self.latest_metrics})

    @_timed("evaluation")
    def _evaluate_shuffled(self, step: int) -> None:
        """At the end: whether the preference comes from the pictures, and what looks wrong in the whole run."""
        if len(self.held_out.rows):
            line = self._logged(step, self.held_out.evaluate_shuffled(self.trainer))
            if line:
                shown = [f"{name} {value:.4g}" for name, value in line.items() if name.endswith((SHUFFLED, "image_reliance"))]
                self._say("With pictures of other records  %s", "  ".join(shown))
            self._warn(is_finished=True)

    def _logged(self, step: int, line: dict[str, float]) -> dict[str, float]:
        if line:
            self._keep({"step": step, **line})
        return line

    def _keep(self, line: Mapping[str, float]) -> None:
        """Writes a line of metrics, and sends it on where it is a new one."""
        self.latest_metrics |= line
        if self.metrics_log is not None and self.reporting is not None and self.metrics_log.append(line):
            self.reporting.log(line)

    def _warn(self, *, is_finished: bool) -> None:
        """Says what looks wrong in the run so far; each thing once."""
        if self.metrics_log is None:
            return
        for kind, words in self.held_out.problems(self.metrics_log.lines, is_finished=is_finished).items():
            if kind not in self.warned:
                logger.warning("Warning: %s", words)
            self.warned.add(kind)

    def _report(self) -> None:
        """Brings the run's page up to date, beside the training."""
        if self.metrics_log is not None:
            metrics, seconds, scores = list(self.metrics_log.lines), self.watch.seconds, self.held_out.pairs

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
        data, sample = self.held_out.data, sample_of(self.held_out.rows, self.config.run.eval_answers)
        if len(sample) and self.trainer.algorithm.needs.head == "language":
            self._say("The model answers %d held-out prompts", len(sample))
            spec, policy = self.data.spec, self.trainer.policy
            ask(
                moment,
                policy,
                spec,
                data,
                sample,
                folder=self.folder,
                rank=self.rank,
                workers=self.num_workers,
                together=policy.sharded is not None,
            )

    @_timed("saving")
    def _save(self, step: int) -> None:
        self.watchdog.tick()
        self._say("Saving the checkpoint of step %d", step)
        with self.progress.pause("saving"), tempfile.TemporaryDirectory() as temporary:
            checkpoint, trainer = None, self.trainer
            has_shards = trains_shards(trainer.policy)
            if self.rank == 0 or has_shards:
                write_checkpoint(
                    Path(temporary),
                    trainer.policy,
                    trainer.optimizer,
                    step=step,
                    scaler=trainer.scaler,
                    best=self.best,
                    rank=self.rank,
                )
                checkpoint = ray.train.Checkpoint.from_directory(temporary)
            ray.train.report(
                {"step": step, **self.latest_metrics},
                checkpoint=checkpoint,
                checkpoint_dir_name=checkpoint_name(step, self.attempt),
                checkpoint_upload_fn=self._upload if self.folder.local_path is None else None,
            )
        self.watchdog.tick()
        if has_shards:
            gather(None)  # until then another worker's files may be under way, and the checkpoint seem damaged
        if self.rank == 0:
            if self.best.step == step:
                write_note(self.folder, self.best, checkpoint_name(step, self.attempt))
            limit = self.config.run.save_total_limit
            prune_checkpoints(self.folder / "checkpoints", keep=limit, best=best_checkpoint(self.folder))

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copies a checkpoint to an object store, each file again where the store fails. (To a disk Ray Train copies it.)"""
        folder = self.folder / "checkpoints" / name
        folder.upload(Path(checkpoint.path))
        filesystem, path = folder.resolve()
        return ray.train.Checkpoint(path, filesystem)

    @_timed("saving")
    def _write_model(self) -> None:
        self._say("Writing the model to %s", (self.folder / "model").location)
        # Every worker has a share of sharded weights.
        gathered = gather_weights(self.trainer.policy, keep=self.rank == 0)
        if self.rank != 0:
            return
        with tempfile.TemporaryDirectory() as temporary:
            safe = self.config.run.safe_serialization
            save_policy(self.trainer.policy, Path(temporary), safe_serialization=safe, gathered=gathered)
            self.data.spec.processor.save_pretrained(temporary)
            (self.folder / "model").upload(Path(temporary))

    def _say(self, message: str, *values: Any) -> None:
        if self.rank == 0:
            logger.info(message, *values)
