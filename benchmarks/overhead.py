"""Ray's overhead: the same training job through `rayalign.train.fit` on one worker and as a bare loop in one process.

    python benchmarks/overhead.py

Both run `rayalign.loop.run_steps` on the same prepared pairs in the same order, one thread for the model and batches made a
few ahead; figures are the `pairs_per_second` of the loop's own metrics, without the first steps. What differs is Ray: its
processes beside the worker, Ray Data's look-ups instead of plain reads, torch.distributed. Start-up is not in these figures.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import ray
import torch
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from synthetic import Shape, draw_pairs, save_model
from transformers.utils import logging as transformers_logging

from rayalign.algorithms import DPO
from rayalign.batch import PairBatch
from rayalign.config import Config, config_from_mapping
from rayalign.data import RunData
from rayalign.loading import load_policy
from rayalign.loop import LoopEvents, Trainer, run_steps
from rayalign.metrics import read_metrics
from rayalign.plan import StepPlan
from rayalign.prepared import from_batch
from rayalign.stream import ahead, batch_maker, plan_of
from rayalign.train import POLL_SECONDS, fit, prepare_run, settle_cluster, start_ray

SHAPE = Shape(128, 4, 4, vocabulary=2_000, vision_hidden=64, vision_layers=2, tile=56, grid=(1, 2))
NUM_RECORDS = 65  # one of them is held out
LOGGING_STEPS = 5
WARM_UP_STEPS = 20


def write_data(folder: Path) -> Path:
    """A JSONL file with its images."""
    folder.mkdir()
    lines = []
    for i, pair in enumerate(draw_pairs(SHAPE, [(10 + i % 7, 8 + i % 11) for i in range(NUM_RECORDS)])):
        pair.image.save(folder / f"{i}.png")
        row = {"query": pair.question, "images": [f"{i}.png"], "response": pair.chosen, "rejected_response": pair.rejected}
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def make_config(folder: Path, *, steps: int) -> Config:
    values = {
        "model": str(save_model(folder / "model", SHAPE)),
        "dataset": [str(write_data(folder / "data"))],
        "output_dir": str(folder / "run"),
        "gradient_checkpointing": False,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "logging_steps": LOGGING_STEPS,
        # Once, at the end: evaluation and saving are not what is measured.
        "eval_steps": steps,
        "save_steps": steps,
    }
    return config_from_mapping(DPO, values)


@contextlib.contextmanager
def own_cluster(config: Config) -> Iterator[None]:
    """A local cluster with the settings of `start_ray`, which itself would join one that other runs load."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    ray.init(address="local", num_cpus=2, include_dashboard=True, logging_level=logging.WARNING)
    start_ray(config)
    try:
        yield
    finally:
        ray.shutdown()


def through_ray(config: Config, data: RunData, *, number: int) -> list[dict[str, float]]:
    """The metrics of a run through Ray Train."""
    run = dataclasses.replace(config.run, output_dir=f"{config.run.output_dir}{number}")
    result = fit(settle_cluster(dataclasses.replace(config, run=run)), data)
    return training_lines(read_metrics(result.output_dir / "metrics.jsonl"))


def bare(config: Config, data: RunData) -> list[dict[str, float]]:
    """The metrics of the same steps in this process."""
    plan = plan_of(config, data)
    policy = load_policy(
        data.source,
        model=config.model,
        tuner=config.tuner,
        device=torch.device("cpu"),
        needs=DPO().needs,
        seed=config.optimizer.seed,
    )
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=plan.num_steps)
    lines: list[dict[str, float]] = []

    def log(metrics: Mapping[str, float]) -> None:
        lines.append(dict(metrics))

    events = LoopEvents(log=log, evaluate=lambda step: None, save=lambda step: None)
    run_steps(trainer, plan, ahead(batches(plan, data), depth=2), config.run, events, start_step=0)
    return lines


def batches(plan: StepPlan, data: RunData) -> Iterator[tuple[int, PairBatch]]:
    reader, make_batch = data.training.reader(), batch_maker(data.spec)
    for step in range(plan.num_steps):
        for rows in plan.micro_batches(step, rank=0):
            yield step, make_batch(from_batch(reader.read(rows)))


def training_lines(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [line for line in lines if "pairs_per_second" in line]


def rates(lines: list[dict[str, float]], name: str = "pairs_per_second") -> list[float]:
    return [line[name] for line in lines if line["step"] > WARM_UP_STEPS]


def check_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest difference between the losses of both runs; raises SystemExit where they did not train alike."""
    losses = [[line["loss"] for line in lines] for lines in (ours, theirs)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if difference > 1e-4:  # the same code on the same batches: a difference would be another order of records
        raise SystemExit(f"The two runs do not train alike: their losses differ by {difference}.")
    return difference


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turn")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TRL and peft still use the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    torch.set_num_threads(1)
    facts = machine_facts(threads=1)
    seconds: dict[str, list[list[float]]] = {"bare": [], "ray": []}
    waits: dict[str, list[float]] = {"bare": [], "ray": []}
    differences = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        config = make_config(Path(temporary), steps=arguments.steps)
        data: RunData | None = None
        for number in range(arguments.rounds):
            with own_cluster(config):
                data = data or prepare_run(config)
                by_ray = through_ray(config, data, number=number)
            by_hand = bare(config, data)
            differences.append(check_alike(by_ray, by_hand))
            for kind, lines in (("ray", by_ray), ("bare", by_hand)):
                seconds[kind].append(rates(lines))
                waits[kind] += rates(lines, "data_wait_fraction")
    measured = {kind: [rate for run in runs for rate in run] for kind, runs in seconds.items()}
    ratios = [median(ray_run) / median(bare_run) for ray_run, bare_run in zip(seconds["ray"], seconds["bare"], strict=True)]
    report = {
        "machine": facts,
        "job": {
            "shape": dataclasses.asdict(SHAPE),
            "steps": arguments.steps,
            "warm_up_steps": WARM_UP_STEPS,
            "pairs_per_step": config.global_batch_size,
            "rounds": arguments.rounds,
            "loss_difference": max(differences),
        },
        "pairs_per_second": {kind: spread(values) for kind, values in measured.items()},
        "data_wait_fraction": {kind: round(median(values), 4) for kind, values in waits.items()},
        "ray_of_bare": spread(ratios),
    }
    write_json(arguments.output, report)
    rows = [
        [
            show(report["pairs_per_second"]["bare"]),
            show(report["pairs_per_second"]["ray"]),
            show(report["ray_of_bare"]),
            *(f"{report['data_wait_fraction'][kind]:.1%}" for kind in ("bare", "ray")),
        ]
    ]
    header = ["bare loop, pairs/s", "one Ray worker, pairs/s", "Ray / bare", "waiting for data, bare", "waiting for data, Ray"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
