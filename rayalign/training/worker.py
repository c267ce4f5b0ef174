"""One worker of Ray Train, from loading the model to its last step: the loop, with Ray's streams, reports and checkpoints
around it. What it tells of the run is in `run_log`."""

import functools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayalign.algorithms import Algorithm
from rayalign.cluster import Stopped, outcome_of
from rayalign.config.config import Config
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData
from rayalign.data.sampler import require_partners
from rayalign.data.stream import pairs_in_order, sampler_of
from rayalign.nodes import room_for_workers
from rayalign.policy.loading import multiplies_bfloat16
from rayalign.policy.saving import gather_weights, save_policy
from rayalign.storage import Store
from rayalign.training.answers import Moment, ask, sample_of
from rayalign.training.benchmark_results import BenchmarkResults
from rayalign.training.best import GOES_ON, Best, Verdict, best_checkpoint, is_of_benchmark, metric_name
from rayalign.training.changes import Changes
from rayalign.training.checkpoint import NONE_YET, Snapshot, load_best, load_checkpoint, load_unlogged, trains_shards
from rayalign.training.checkpoint_folder import ALL_SHARDS, FetchedCheckpoint, fetch, fetch_newest, settle_checkpoints
from rayalign.training.distributed import gather
from rayalign.training.gauges import Gauges
from rayalign.training.group import Group
from rayalign.training.held_out import HeldOut
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import Unlogged
from rayalign.training.profiling import StepProfiler, profiled_steps
from rayalign.training.ready import MetByAll, everywhere, ready_policy
from rayalign.training.reference_pass import compute_reference, missing_reference
from rayalign.training.run_log import RunLog, teller
from rayalign.training.run_report import keep_scores
from rayalign.training.run_times import Stopwatch, note_workers, workers_before
from rayalign.training.saving import CheckpointWriter
from rayalign.training.watchdog import Watchdog
from rayalign.training.worker_result import WorkerResult

logger = logging.getLogger(__name__)


def train_worker(config: Config, data: RunData, group: Group) -> WorkerResult | Stopped:
    """Runs in each train worker; rank 0 writes the model.

    Returns the error where every worker meets it, and would meet it again: flags that don't fit the model, a loss that is no
    longer finite. Any other error is raised, so that Ray ends the workers that wait for this one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        worker = outcome_of(lambda: _Worker(config, data, group, Path(temporary)), errors=(ValueError,))
    if isinstance(worker, Stopped):
        return worker
    try:
        with worker.writer:
            return outcome_of(worker.train, errors=(FloatingPointError, MetByAll))
    except SystemExit:  # a sweep's scheduler ends the run, whose process goes on with another one
        worker.log.close()
        raise


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

    def __init__(self, config: Config, data: RunData, group: Group, temporary: Path) -> None:
        """Goes on from the newest whole checkpoint, which is fetched into `temporary`."""
        self.config = config
        self.data = data
        self.group = group
        self.folder = Store.at(str(config.run.output_dir))
        self.watch = Stopwatch(workers_before(self.folder))
        self.rank, self.num_workers = group.rank, group.num_workers
        self._say = teller(self.rank)
        gauges = Gauges(self.folder.name, self.rank)
        self.watchdog = Watchdog(self.rank, functools.partial(logger.warning, "Warning: %s"), idle=gauges.idle)
        self.watchdog.start()
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.device = group.device
        algorithm: Algorithm = config.algorithm
        self.sampler = sampler_of(config, data, num_workers=self.num_workers)
        if data.held_out and self.sampler.settings.with_partners:
            require_partners(data.held_out.num_rows, "in --val_dataset")
        shards = config.cluster.shard_group_size or self.num_workers
        self.shard = (self.rank % shards, shards) if config.cluster.shards_models else ALL_SHARDS
        checkpoint = fetch_newest(self.folder / "checkpoints", temporary, shard=self.shard)
        self.start_step = checkpoint.step if checkpoint else 0
        tables = functools.partial(group.tables, data.training, self.sampler, start_step=self.start_step)
        missing = missing_reference(config, data, self.sampler) if config.cluster.shards_models else ()
        if not missing:
            # Ray Data starts while the model is loaded. Batches wait: loading changes torch's default type, in all threads.
            self.tables = tables()
        self._say("Loading %s", data.source.base)
        with self.watch.stage("model_loading"):
            policy, fillers = ready_policy(
                config, data, device=self.device, rank=self.rank, say=self._say, kept=group.kept_base
            )
        if missing:
            with self.watch.stage("reference"):
                workers = {"rank": self.rank, "num_workers": self.num_workers}
                compute_reference(policy, config, data, missing, **workers, say=self._say, tick=self.watchdog.tick)
            self.tables = tables()
        num_steps = self.sampler.num_steps
        self.trainer = Trainer(policy, algorithm, config.optimizer, num_steps=num_steps, rank=self.rank, fillers=fillers)
        self.benchmarks = BenchmarkResults(config)
        self.best, self.unlogged = everywhere(lambda: self._go_on_from(checkpoint))
        watched = self.watchdog.watched
        self.held_out = HeldOut(config, data, self.sampler, rank=self.rank, num_workers=self.num_workers, watched=watched)
        self._require_held_out()
        steps = (self.start_step, self.sampler.num_steps)
        self.log = everywhere(
            lambda: RunLog(config, data, policy, gauges, rank=self.rank, num_workers=self.num_workers, steps=steps)
        )
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self._say("Training %s from step %d to %d, on %d x %s", algorithm.name.upper(), *steps, self.num_workers, chip)
        if self.device.type == "cpu" and policy.dtype == torch.float32 and multiplies_bfloat16():
            self._say("This CPU multiplies in bfloat16: with --dtype bfloat16 a step takes about 0.6 of the time")
        profiled = profiled_steps(config.run.profile_steps)
        if profiled and not set(profiled) & set(range(self.start_step + 1, self.sampler.num_steps + 1)):
            self._say("--profile_steps %s: no such step is still to come", config.run.profile_steps)
        self.profiler = StepProfiler(profiled, self.folder, rank=self.rank)
        self.changes = Changes(has_room=self._has_room, find=group.preemption)
        is_sharded = trains_shards(policy)
        self.writer = CheckpointWriter(
            self.folder,
            attempt=gather(uuid.uuid4().hex[:8])[0],
            keep=config.run.save_total_limit,
            rank=self.rank,
            is_sharded=is_sharded,
            copies=group.num_local_workers if is_sharded else 1,
            waits=BenchmarkResults(config).waits,  # asked in the writer's thread
        )

    def _go_on_from(self, checkpoint: FetchedCheckpoint | None) -> tuple[Best, Unlogged]:
        """Restores what a checkpoint holds; returns the best evaluation until then, and what was not logged."""
        best, unlogged = NONE_YET, Unlogged()
        if checkpoint is not None:
            best = load_best(checkpoint, self.config.run)
            unlogged = Unlogged.of(load_unlogged(checkpoint), self.rank, self.num_workers)
            load_checkpoint(checkpoint, self.trainer.policy, self.trainer.optimizer, scaler=self.trainer.scaler)
        if self.rank == 0:
            settle_checkpoints(self.folder, self.config.run, best, checkpoint)
        return best, unlogged

    def _has_room(self) -> bool:
        """Whether an elastic run could have more workers than it has."""
        if self.rank != 0 or self.num_workers == self.config.cluster.most_workers:
            return False
        return room_for_workers(self.config) > self.num_workers

    def _require_held_out(self) -> None:
        """Raises ValueError where flags look at evaluations, of which there will be none."""
        run = self.config.run
        flags = ["early_stopping_patience", "load_best_model_at_end"]
        if not is_of_benchmark(run):
            flags.append("metric_for_best_model")
        asked = [name for name in flags if getattr(run, name)]
        if asked and not len(self.held_out.rows):
            raise ValueError(
                f"--{asked[0]} {getattr(run, asked[0])}: no record is held out, so nothing is evaluated. Pass --val_dataset or "
                "a higher --dataset_test_ratio, or leave the flag out."
            )

    def _require_metric(self) -> None:
        """Raises ValueError on rank 0 where evaluations lack what decides on the best one."""
        if self.rank == 0 and self.held_out.pairs and not is_of_benchmark(self.config.run):
            metric_name(self.config.run.metric_for_best_model, self.log.latest)

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
        stream = self.watchdog.watched(stream)
        events = LoopEvents(
            log=self.log.step,
            evaluate=self._evaluate_and_report,
            save=self._save,
            judge=self._judge,
            is_urgent=self.changes.are_near,
            around_step=self._around_step,
        )
        if self.start_step == 0:
            if self.config.run.eval_on_start:
                self._evaluate(0)
                everywhere(self._require_metric)
            self._answer("before")
        with self.watch.stage("training"):
            # A run that was killed after it stopped early stays stopped.
            stays_stopped = self.best.stops(self.config.run)
            last_step = self.start_step if stays_stopped else self._take_steps(stream, events)
        self.profiler.close()
        stopped = self._why_stopped(last_step)
        model_step = last_step
        if self.config.run.load_best_model_at_end and self.best.step not in (None, last_step):
            self._finish_checkpoints()
            model_step = self._return_to_best()
        elif self.start_step == last_step:
            self._evaluate(model_step)
        self._evaluate_shuffled(model_step)
        self._answer("after")
        self._write_model()
        self._finish_checkpoints()
        if self.rank == 0:
            self._say("The training stood still for checkpoints for %.1f s, %.1f %% of its time", *self._stood_still())
            self.log.close()
            keep_scores(self.folder, self.held_out.pairs)
            note_workers(self.folder, self.watch.seconds)
        self.watchdog.stop()
        return WorkerResult(
            metrics={name: value for name, value in self.log.latest.items() if name != "step"},
            num_steps=last_step,
            num_training_records=len(self.sampler.rows),
            num_held_out_records=len(self.held_out.rows),
            best=self.best,
            model_step=model_step,
            stopped=stopped,
        )

    def _take_steps(self, stream: Iterator[tuple[int, PairBatch]], events: LoopEvents) -> int:
        """Takes the steps that are left; returns the last one. Raises FloatingPointError once the page tells of the end."""
        try:
            return run_steps(
                self.trainer,
                self.sampler,
                stream,
                self.config.run,
                events,
                start_step=self.start_step,
                tokens_before=self.log.latest.get("num_tokens", 0),
                unlogged=self.unlogged,
            )
        except FloatingPointError:
            self.log.end(self.held_out.pairs, self.watch.seconds)
            raise

    def _judge(self, step: int) -> Verdict:
        """What the evaluation just made means; rank 0 decides, which alone has every metric of a run that goes on."""
        run = self.config.run
        if not self.held_out.pairs or is_of_benchmark(run):
            return GOES_ON
        self.best = gather(self.best.after(step, self.log.latest, run) if self.rank == 0 else None)[0]
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
        with self.log.progress.step(pairs):
            yield
        self.writer.check()
        self.watchdog.tick()
        self.profiler.after(step)

    @_timed("evaluation")
    def _evaluate(self, step: int) -> None:
        if len(self.held_out.rows):
            self.watchdog.tick()
            self._say("Evaluating %d held-out records at step %d", len(self.held_out.rows), step)
            with self.log.progress.pause("evaluation"):
                self.log.evaluation(step, self.held_out.evaluate(self.trainer))
            self.log.warn(self.held_out, step=step, is_finished=False)
        self.log.report(self.held_out.pairs, self.watch.seconds)

    def _evaluate_and_report(self, step: int) -> None:
        """The last evaluation is not reported: who hears of it could stop the run before its model is written."""
        self._evaluate(step)
        if step < self.sampler.num_steps and len(self.held_out.rows):
            self.group.evaluated({"step": step, "num_steps": self.sampler.num_steps, **self.log.latest})

    @_timed("evaluation")
    def _evaluate_shuffled(self, step: int) -> None:
        """At the end: whether the preference comes from the pictures, and what looks wrong in the whole run."""
        if len(self.held_out.rows):
            self.log.shuffled(step, self.held_out.evaluate_shuffled(self.trainer))
            self.log.warn(self.held_out, step=step, is_finished=True)

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

    @_timed("checkpoints")
    def _save(self, step: int, unlogged: Sequence[Unlogged]) -> None:
        self.watchdog.tick()
        self._say("Saving the checkpoint of step %d", step)
        self.log.keep()
        trainer = self.trainer
        with self.log.progress.pause("saving"):
            if self.rank == 0 or trains_shards(trainer.policy):
                snapshot = Snapshot.of(
                    trainer.policy,
                    trainer.optimizer,
                    step=step,
                    scaler=trainer.scaler,
                    best=self.best,
                    unlogged=unlogged,
                    rank=self.rank,
                )
                self.writer.save(snapshot, is_best=self.best.step == step)
            self.group.saved(step, self.writer.whole)
        self.log.benchmarks(self.benchmarks, up_to=step)
        self.watchdog.tick()

    @_timed("checkpoints")
    def _finish_checkpoints(self) -> None:
        self.writer.wait()

    def _stood_still(self) -> tuple[float, float]:
        """For how many seconds, and for what percentage of the time of all steps, the training waited for checkpoints."""
        seconds = self.watch.seconds
        still = seconds.get("checkpoints", 0.0)
        return still, 100 * still / (seconds["training"] + still)

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
