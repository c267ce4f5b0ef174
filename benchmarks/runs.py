"""Training runs of a small job, through Ray Train or as bare loops in processes of their own, and what their logs say.

Both run `rayalign.training.loop.run_steps` on the same prepared pairs in the same order, with one thread for the model and
batches made a few ahead.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
import torch
from measuring import set_up
from synthetic import Shape, save_model, write_records

from rayalign.algorithms import DPO
from rayalign.cluster import set_ray_variables
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData, prepare_run
from rayalign.data.sampler import StepSampler
from rayalign.data.store import from_batch
from rayalign.data.stream import ahead, batch_maker, sampler_of
from rayalign.joining import start_ray
from rayalign.nodes import resolve_cluster
from rayalign.policy.loading import load_policy
from rayalign.storage import Store
from rayalign.training.driver import fit
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import read_metrics

NUM_RECORDS = 64
LOGGING_STEPS = 2
RAY_NICENESS = 15
"""Ray starts its workers with it; so do we, or what else runs on the machine would take more from one side."""

Lines = list[dict[str, float]]
"""Of every LOGGING_STEPS steps: `metrics.jsonl`'s, and `cpu_seconds`, the processor time of the process until then."""


def make_job(folder: Path, shape: Shape, words: tuple[int, int], flags: Mapping[str, Any]) -> tuple[Config, RunData]:
    """A job on a new model and new records, prepared; nothing is held out, and one checkpoint is written at the end."""
    values = {
        "model": str(save_model(folder / "model", shape)),
        "dataset": [str(write_records(folder / "data", pairs=NUM_RECORDS, words=words))],
        "output_dir": str(folder / "run"),
        "dataset_test_ratio": 0,
        "gradient_checkpointing": False,
        "lora_target_modules": ["ALL"],
        "rpo_alpha": 0,
        "learning_rate": 2e-5,
        "logging_steps": LOGGING_STEPS,
        # Not what is measured.
        "precompute_ref_log_probs": False,
        "eval_steps": 1_000_000,
        "save_steps": 1_000_000,
    }
    config = config_from_mapping(DPO, {**values, **flags})
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for a worker with one CPU
    with own_cluster(config):
        return config, prepare_run(config)


@contextlib.contextmanager
def own_cluster(config: Config) -> Iterator[None]:
    """A local cluster with the settings of `start_ray`, which itself would join one that other runs load."""
    set_ray_variables()
    cluster = config.cluster
    cpus = max(os.cpu_count() or 1, int(cluster.num_workers * cluster.cpus_per_worker) + 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)
    start_ray(config)
    try:
        yield
    finally:
        ray.shutdown()


def through_ray(config: Config, data: RunData, *, name: str) -> tuple[Lines, float]:
    """The metrics of a run through Ray Train on one worker or more, with the first worker's processor time, and how many cores'
    time all other processes of the cluster took meanwhile."""
    output = f"{config.run.output_dir}-{name}"
    run = dataclasses.replace(config.run, output_dir=output)
    with own_cluster(config):
        watch = Watch(Path(output) / "metrics.jsonl")
        fit(resolve_cluster(dataclasses.replace(config, run=run)), data)
        watch.stop()
    lines = read_metrics(Store.at(output) / "metrics.jsonl")
    return [{**line, "cpu_seconds": watch.of_worker[int(line["step"])]} for line in lines], watch.cores_beside


class Watch(threading.Thread):
    """Notes the processor time of a cluster's processes whenever the run logs a line."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.of_worker: dict[int, float] = {}
        self.cores_beside = 0.0
        self._metrics = metrics
        self._others: dict[int, float] = {}
        self._ended = threading.Event()
        self.start()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        beside: list[tuple[float, float]] = []
        size = 0
        # Often enough for lines that are a second apart; a look costs little while there is no new one.
        while not self._ended.wait(0.05):
            before, size = size, self._metrics.stat().st_size if self._metrics.exists() else 0
            if size == before:
                continue
            lines = read_metrics(Store.at(str(self._metrics)))
            steps = [int(line["step"]) for line in lines if int(line["step"]) not in self.of_worker]
            if not steps:
                continue
            worker, others = self._processor_seconds()
            self.of_worker |= dict.fromkeys(steps, worker)
            beside.append((time.perf_counter(), others))
        if len(beside) > 1:
            (began, before), (ended, after) = beside[0], beside[-1]
            self.cores_beside = (after - before) / (ended - began)

    def _processor_seconds(self) -> tuple[float, float]:
        """Of the first train worker, and of all that Ray runs beside the train workers, ended processes included."""
        workers: list[tuple[int, float]] = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                if "RayTrainWorker" in process.cmdline()[0]:
                    workers.append((process.pid, times.user + times.system))
                else:
                    self._others[process.pid] = times.user + times.system
        return min(workers)[1] if workers else 0.0, sum(self._others.values())


def bare_at_once(config: Config, data: RunData, *, copies: int = 1) -> list[Lines]:
    """The metrics of a job's steps in new processes, all at once and with nothing to say to each other."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(copies, mp_context=context) as pool:
        barrier = manager.Barrier(copies)
        return list(pool.map(run_bare, [config] * copies, [data] * copies, [barrier] * copies))


def run_bare(config: Config, data: RunData, barrier: threading.Barrier) -> Lines:
    os.setsid()
    os.nice(RAY_NICENESS)
    set_up(threads=1)
    sampler = sampler_of(config, data)
    policy = load_policy(
        data.source,
        model=config.model,
        tuner=config.tuner,
        device=torch.device("cpu"),
        needs=DPO().needs,
        seed=config.optimizer.seed,
    )
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=sampler.num_steps)
    lines: Lines = []

    def log(metrics: Mapping[str, float]) -> None:
        lines.append({**metrics, "cpu_seconds": time.process_time()})

    events = LoopEvents(log=log, evaluate=lambda step: None, save=lambda step: None)
    barrier.wait()
    run_steps(trainer, sampler, ahead(batches(sampler, data), depth=2), config.run, events, start_step=0)
    return lines


def batches(sampler: StepSampler, data: RunData) -> Iterator[tuple[int, PairBatch]]:
    reader, make_batch = data.training.reader(), batch_maker(data.spec)
    for step in range(sampler.num_steps):
        for rows in sampler.micro_batches(step, rank=0):
            yield step, make_batch(from_batch(reader.read(rows)))


def warm(lines: Lines, warm_up_steps: int) -> Lines:
    """The lines without those of the first steps."""
    kept = [line for line in lines if line["step"] > warm_up_steps]
    if not kept:
        raise SystemExit(f"No line is left of {len(lines)} without the first {warm_up_steps} steps: give --steps more.")
    return kept


def rate(lines: Lines, warm_up_steps: int) -> float:
    """Pairs per second of wall time."""
    return median(line["pairs_per_second"] for line in warm(lines, warm_up_steps))


def cpu_seconds_per_step(lines: Lines, warm_up_steps: int) -> float:
    """Of the process that trains, between the first and the last line behind the warm-up."""
    kept = [line for line in lines if line["step"] >= warm_up_steps]
    return (kept[-1]["cpu_seconds"] - kept[0]["cpu_seconds"]) / (kept[-1]["step"] - kept[0]["step"])


def check_alike(runs: Sequence[Lines]) -> float:
    """The largest difference between the losses of some runs and of the first; raises SystemExit where they did not train
    alike."""
    losses = [[line["loss"] for line in lines] for lines in runs]
    difference = max(abs(a - b) for others in losses for a, b in zip(losses[0], others, strict=True))
    if difference > 1e-4:  # the same code on the same pairs: a difference would be another order of records
        raise SystemExit(f"The runs do not train alike: their losses differ by {difference}.")
    return difference
