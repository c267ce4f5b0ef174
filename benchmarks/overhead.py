"""Ray's overhead: the same training job through `rayalign.training.driver.fit` on one worker and as a bare loop in one process.

    python benchmarks/overhead.py                             # eight minutes on two idle cores
    python benchmarks/overhead.py --rounds 1 --steps 8 --warm_up_steps 2     # a smoke test, mostly imports and starts

Both run `rayalign.training.loop.run_steps` on the same prepared pairs in the same order, each in a new process, with one
thread for the model and batches made a few ahead. Runs alternate, bare, Ray, bare, Ray, bare: a Ray run is compared with the
two bare ones around it, and what bare ones differ by among themselves says how small a cost can be seen. What differs is Ray:
its processes beside the worker, Ray Data's fetches instead of plain reads, torch.distributed. Start-up is not in these
figures.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import ray
import torch
from job import write_records
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from synthetic import Shape, save_model
from transformers.utils import logging as transformers_logging

from rayalign.algorithms import DPO
from rayalign.cluster import resolve_cluster, set_ray_variables, start_ray
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.batch import PairBatch
from rayalign.data.prepare import RunData, prepare_run
from rayalign.data.sampler import StepSampler
from rayalign.data.store import from_batch
from rayalign.data.stream import ahead, batch_maker, sampler_of
from rayalign.policy.loading import load_policy
from rayalign.storage import Store
from rayalign.training.driver import fit
from rayalign.training.loop import LoopEvents, Trainer, run_steps
from rayalign.training.metrics import read_metrics

SHAPE = Shape(128, 4, 4, vocabulary=2_000, vision_hidden=64, vision_layers=2, tile=56, grid=(2, 2))
WORDS = (30, 50)
NUM_RECORDS = 64
LOGGING_STEPS = 2
RAY_NICENESS = 15
"""Ray starts its workers with it; so do we, or what else runs on the machine would take more from one side."""

Lines = list[dict[str, float]]
"""Of every LOGGING_STEPS steps: `metrics.jsonl`'s, and `cpu_seconds`, the processor time of the process until then."""


def make_config(folder: Path, shape: Shape, words: tuple[int, int], flags: Mapping[str, Any]) -> Config:
    """A job on a new model and new records; nothing is held out, and one checkpoint is written at the end."""
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
    return config_from_mapping(DPO, {**values, **flags})


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


def bare_alone(config: Config, data: RunData) -> Lines:
    """The metrics of a job's steps in one new process."""
    (lines,) = bare_at_once([config], data)
    return lines


def bare_at_once(configs: Sequence[Config], data: RunData) -> list[Lines]:
    """The metrics of several jobs' steps, each in a new process, all at once and with nothing to say to each other."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(configs), mp_context=context) as pool:
        barrier = manager.Barrier(len(configs))
        return list(pool.map(run_bare, configs, [data] * len(configs), [barrier] * len(configs)))


def run_bare(config: Config, data: RunData, barrier: threading.Barrier) -> Lines:
    os.setsid()
    os.nice(RAY_NICENESS)
    quiet_libraries()
    torch.set_num_threads(1)
    plan = sampler_of(config, data)
    policy = load_policy(
        data.source,
        model=config.model,
        tuner=config.tuner,
        device=torch.device("cpu"),
        needs=DPO().needs,
        seed=config.optimizer.seed,
    )
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=plan.num_steps)
    lines: Lines = []

    def log(metrics: Mapping[str, float]) -> None:
        lines.append({**metrics, "cpu_seconds": time.process_time()})

    events = LoopEvents(log=log, evaluate=lambda step: None, save=lambda step: None)
    barrier.wait()
    run_steps(trainer, plan, ahead(batches(plan, data), depth=2), config.run, events, start_step=0)
    return lines


def batches(plan: StepSampler, data: RunData) -> Iterator[tuple[int, PairBatch]]:
    reader, make_batch = data.training.reader(), batch_maker(data.spec)
    for step in range(plan.num_steps):
        for rows in plan.micro_batches(step, rank=0):
            yield step, make_batch(from_batch(reader.read(rows)))


def quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TRL and peft still use the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


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


def around(values: Sequence[float], i: int) -> float:
    """The mean of the bare runs before and after Ray's run i."""
    return mean(values[i : i + 2])


def report_of(bare: Sequence[Lines], by_ray: Sequence[Lines], beside: Sequence[float], warm_up_steps: int) -> dict[str, Any]:
    kinds = {"bare": bare, "ray": by_ray}
    rates = {kind: [rate(lines, warm_up_steps) for lines in runs] for kind, runs in kinds.items()}
    cpu = {kind: [cpu_seconds_per_step(lines, warm_up_steps) for lines in runs] for kind, runs in kinds.items()}
    waits = {
        kind: [line["data_wait_fraction"] for lines in runs for line in warm(lines, warm_up_steps)]
        for kind, runs in kinds.items()
    }
    numbers = range(len(by_ray))
    return {
        "loss_difference": check_alike([*bare, *by_ray]),
        "pairs_per_second": {kind: spread(values) for kind, values in rates.items()},
        "cpu_seconds_per_step": {kind: spread(values) for kind, values in cpu.items()},
        "overhead": {
            "wall": spread([around(rates["bare"], i) / rates["ray"][i] - 1 for i in numbers]),
            "cpu": spread([cpu["ray"][i] / around(cpu["bare"], i) - 1 for i in numbers]),
        },
        "bare_runs_differ_by": {
            "wall": spread([abs(a / b - 1) for a, b in pairwise(rates["bare"])]),
            "cpu": spread([abs(a / b - 1) for a, b in pairwise(cpu["bare"])]),
        },
        "cores_beside": spread(beside),
        "data_wait_fraction": {kind: round(mean(values), 5) for kind, values in waits.items()},
    }


def table_of(report: Mapping[str, Any]) -> str:
    header = ["", "bare loop", "one Ray worker", "Ray costs", "bare runs differ by"]
    measures = {"wall": "pairs/s, wall time", "cpu": "processor seconds a step"}
    figures = {"wall": "pairs_per_second", "cpu": "cpu_seconds_per_step"}
    rows = [
        [
            name,
            *(show(report[figures[measure]][kind]) for kind in ("bare", "ray")),
            *(show_percent(report[key][measure]) for key in ("overhead", "bare_runs_differ_by")),
        ]
        for measure, name in measures.items()
    ]
    waits = [f"{report['data_wait_fraction'][kind]:.2%}" for kind in ("bare", "ray")]
    rows.append(["waiting for data", *waits, "-", "-"])
    rows.append(["other processes of Ray, cores", "-", show(report["cores_beside"]), "-", "-"])
    return markdown_table(header, rows)


def show_percent(values: Mapping[str, float]) -> str:
    return f"{values['median']:.1%} ({values['min']:.1%}-{values['max']:.1%})".replace("(-", "(−").replace("--", "-−")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="Ray runs; there is one bare run more")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--warm_up_steps", type=int, default=40, help="steps that do not count: Ray Data starts beside them")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for a worker with one CPU
    facts = machine_facts(threads=1)
    bare: list[Lines] = []
    by_ray: list[Lines] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        flags = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": arguments.steps}
        config = make_config(Path(temporary), SHAPE, WORDS, flags)
        with own_cluster(config):
            data = prepare_run(config)
        bare.append(bare_alone(config, data))
        for number in range(arguments.rounds):
            lines, cores = through_ray(config, data, name=str(number))
            by_ray.append(lines)
            beside.append(cores)
            bare.append(bare_alone(config, data))
    job = {
        "shape": dataclasses.asdict(SHAPE),
        "response_words": WORDS,
        "steps": arguments.steps,
        "warm_up_steps": arguments.warm_up_steps,
        "pairs_per_step": config.global_batch_size,
        "rounds": arguments.rounds,
    }
    report = {"machine": facts, "job": job, **report_of(bare, by_ray, beside, arguments.warm_up_steps)}
    write_json(arguments.output, report)
    sys.stderr.write(json.dumps({k: report[k] for k in ("overhead", "bare_runs_differ_by")}) + "\n")
    print(table_of(report))


if __name__ == "__main__":
    main()
