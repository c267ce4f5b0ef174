"""The whole job, from records on disk to a saved adapter: `pipelines/dpo.py` as its users start it, against TRL's DPOTrainer.

    python benchmarks/job.py                                  # 1,000 pairs, two epochs; 20 minutes on two cores
    python benchmarks/job.py --case tiny --pairs 12           # a smoke test, mostly imports and starts

Each job is a process of its own, timed from its start to its exit: rayalign with nothing prepared (cold), TRL, and rayalign
once more, which finds its records encoded and its reference scored (warm). All read the same records, images and model, and
have all cores. Steps, tokens, losses and the shapes of the adapters are compared before anything is reported.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import machine_facts, parser_of, ratios, show, spread, table, write_json
from safetensors import safe_open
from sides import BETA, LANGUAGE_LINEARS, LORA_ALPHA, LORA_RANK
from synthetic import RECORDS_CASES, RecordsCase, save_model, write_records

ROOT = Path(__file__).parents[1]
KINDS = ("trl", "cold", "warm")
LEARNING_RATE = 5e-5
LOSS_TOLERANCE = 0.03
"""On the mean loss of an epoch. Both sides draw their adapters and the order of the pairs by seeds of their own; runs of one
side whose seeds differ lie up to 0.01 apart, and a learning rate that is wrong by half moves an epoch by more than 0.05."""


@dataclass(frozen=True)
class Settings:
    """What both sides are told. `steps` None: whole epochs. Micro-batches are each side's own (pairs)."""

    pairs: int
    epochs: int
    steps: int | None
    global_batch_size: int
    trl_batch_size: int
    batch_size: int
    num_workers: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps or self.epochs * self.steps_per_epoch

    @property
    def logging_steps(self) -> int:
        """5, rayalign's default, or less, so that every epoch and the run end with a line."""
        return math.gcd(5, self.steps or self.steps_per_epoch)

    @property
    def cpus_per_worker(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.num_workers)


@dataclass(frozen=True)
class Outcome:
    """A finished job. `losses`: the mean of each epoch; `tokens` of the rows it ran, padding left out; `adapter`: shapes."""

    seconds: float
    phases: dict[str, float]
    steps: int
    losses: list[float]
    tokens: int
    pairs_per_second: float
    adapter: dict[str, list[int]]


def train_with_trl(job: Mapping[str, Any]) -> None:
    """The job in TRL, run in a process of its own in the records' folder; writes what came of it to `job["result"]`."""
    import torch
    from datasets import Image as ImageColumn
    from datasets import List, load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    settings = Settings(**job["settings"])
    dataset = load_dataset("json", data_files=job["dataset"], split="train").cast_column("images", List(ImageColumn()))
    trainer = DPOTrainer(
        model=job["model"],
        args=DPOConfig(
            output_dir=job["output_dir"],
            beta=BETA,
            max_length=None,
            num_train_epochs=settings.epochs,
            max_steps=settings.steps or -1,
            per_device_train_batch_size=settings.trl_batch_size,
            gradient_accumulation_steps=settings.global_batch_size // settings.trl_batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=settings.logging_steps,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        peft_config=LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LANGUAGE_LINEARS),
    )
    started = time.time()
    trainer.train()
    trained = time.time()
    trainer.save_model(job["output_dir"])
    history = [line for line in trainer.state.log_history if "loss" in line]
    result = {
        "started": started,
        "trained": trained,
        "saved": time.time(),
        "steps": trainer.state.global_step,
        "threads": torch.get_num_threads(),
        "tokens": history[-1]["num_tokens"],
        "losses": [line["loss"] for line in history],
    }
    Path(job["result"]).write_text(json.dumps(result))


class Benchmark:
    """The jobs over one folder with model and records."""

    def __init__(self, folder: Path, case: RecordsCase, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.model = save_model(folder / "model", case.shape)
        self.dataset = write_records(folder / "data", pairs=settings.pairs, words=case.words)

    def trl(self, number: int) -> Outcome:
        place = self.folder / f"trl{number}"
        place.mkdir()
        job = {
            "settings": asdict(self.settings),
            "model": str(self.model),
            "dataset": str(self.dataset),
            "output_dir": str(place / "model"),
            "result": str(place / "result.json"),
        }
        (place / "job.json").write_text(json.dumps(job))
        began = time.time()
        lines = run_command(
            [sys.executable, __file__, "--trl_job", str(place / "job.json")],
            cwd=self.dataset.parent,  # where its images' paths start
            environment={"HF_DATASETS_CACHE": str(place / "cache")},
        )
        ended = lines[-1][0]
        result = json.loads((place / "result.json").read_text())
        if result["threads"] != os.cpu_count():
            raise SystemExit(f"TRL had {result['threads']} threads on {os.cpu_count()} cores.")
        stamps = [began, result["started"], result["trained"], result["saved"], ended]
        names = ("start", "training", "saving", "exit")
        phases = {name: after - before for name, (before, after) in zip(names, pairwise(stamps), strict=True)}
        return self._outcome(phases, result["steps"], result["losses"], result["tokens"], place / "model")

    def rayalign(self, number: int, kind: str) -> Outcome:
        """`kind` names the run's folder; runs of one number share their cache: the first is cold, the second warm."""
        settings = self.settings
        output = self.folder / f"{kind}{number}"
        flags: dict[str, Any] = {
            "model": self.model,
            "dataset": self.dataset,
            "output_dir": output,
            "cache_dir": self.folder / f"cache{number}",
            "dataset_test_ratio": 0,
            "beta": BETA,
            "rpo_alpha": 0,
            "lora_target_modules": "ALL",
            "lora_rank": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
            "gradient_checkpointing": "false",
            "num_train_epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.global_batch_size // (settings.batch_size * settings.num_workers),
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0,
            # transformers' defaults, which TRL keeps
            "weight_decay": 0,
            "adam_beta2": 0.999,
            "logging_steps": settings.logging_steps,
            "save_steps": settings.num_steps,
            "num_workers": settings.num_workers,
            "cpus_per_worker": settings.cpus_per_worker,
        }
        if settings.steps:
            flags["max_steps"] = settings.steps
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        began = time.time()
        lines = run_command([sys.executable, str(ROOT / "pipelines" / "dpo.py"), *words], cwd=ROOT, environment={})
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((output / "summary.json").read_text())
        phases = phases_of(began, lines, steps=summary["steps"])
        losses = [line["loss"] for line in metrics]
        return self._outcome(phases, summary["steps"], losses, summary["num_tokens"], output / "model")

    def expected_tokens(self, number: int) -> dict[str, int]:
        """What each side must have run in whole epochs, by the encoded records: rows of prompt and both responses here, two
        rows a pair there."""
        from rayalign.data.store import PreparedData  # here, so that TRL's process does not wait for it
        from rayalign.storage import Store

        (manifest,) = (self.folder / f"cache{number}").glob("*/manifest.json")
        data = PreparedData.find(Store.at(str(manifest.parent)))
        assert data is not None
        token_counts = data.token_counts()
        responses = int(token_counts.chosen.sum() + token_counts.rejected.sum())
        prompts = int(token_counts.prompt.sum())
        return {
            "rayalign": self.settings.epochs * (prompts + responses),
            "trl": self.settings.epochs * (2 * prompts + responses),
        }

    def _outcome(self, phases: dict[str, float], steps: int, losses: Sequence[float], tokens: float, model: Path) -> Outcome:
        settings = self.settings
        # The mean loss of every epoch, or of the run where it isn't made of epochs.
        size = len(losses) if settings.steps else settings.steps_per_epoch // settings.logging_steps
        pairs = settings.steps * settings.global_batch_size if settings.steps else settings.epochs * settings.pairs
        with safe_open(model / "adapter_model.safetensors", "np") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  # no mapping
        return Outcome(
            seconds=sum(phases.values()),
            phases=phases,
            steps=steps,
            losses=[mean(losses[start : start + size]) for start in range(0, len(losses), size)],
            tokens=int(tokens),
            pairs_per_second=pairs / phases["training"],
            adapter=shapes,
        )


def run_command(command: list[str], *, cwd: Path, environment: Mapping[str, str]) -> list[tuple[float, str]]:
    """The lines a command prints, each with the time it came, and an empty one with the time of its exit; raises SystemExit
    with the last of them where it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # each side sets its threads itself
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    settings = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**kept, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append((time.time(), line))
        sys.stderr.write(line)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(line for _, line in lines[-30:])}")
    return [*lines, (time.time(), "")]


def phases_of(began: float, lines: Sequence[tuple[float, str]], *, steps: int) -> dict[str, float]:
    """Seconds of a rayalign job by what it logs: `start` are imports and Ray's own, `workers` those of Ray Train and the
    model's loading, `saving` the checkpoint, the adapter and the report."""
    data, words = find_line(lines, r"Data: \d+ records (?:of|encoded in ([\d.]+) s)")
    encoding = float(words[1] or 0)
    scored, _ = find_line(lines, r"Reference: log-probs of|Training \w+ from step")
    begun, _ = find_line(lines, r"Training \w+ from step")
    trained, _ = find_line(lines, rf"Step {steps}/{steps} ")
    done, _ = find_line(lines, r"Done: \d+ steps")
    return {
        "start": data - encoding - began,
        "data": encoding,
        "reference": scored - data if scored != begun else 0.0,
        "workers": begun - (scored if scored != begun else data),
        "training": trained - begun,
        "saving": done - trained,
        "exit": lines[-1][0] - done,
    }


def find_line(lines: Sequence[tuple[float, str]], pattern: str) -> tuple[float, re.Match[str]]:
    """The first line with a match."""
    for stamp, line in lines:
        found = re.search(pattern, line)
        if found:
            return stamp, found
    raise SystemExit(f"The job printed no line like {pattern!r}.")


def check_alike(ours: Outcome, theirs: Outcome, expected: Mapping[str, int] | None) -> dict[str, Any]:
    """What both jobs did; raises SystemExit where it was not the same work. `expected`: tokens of whole epochs."""
    report = {
        "steps": {"rayalign": ours.steps, "trl": theirs.steps},
        "loss_by_epoch": {side: [round(loss, 4) for loss in o.losses] for side, o in (("rayalign", ours), ("trl", theirs))},
        "tokens": {"rayalign": ours.tokens, "trl": theirs.tokens},
        "tokens_expected": expected,
        "adapter": {
            "tensors": len(ours.adapter),
            "weights": sum(math.prod(shape) for shape in ours.adapter.values()),
            "same_shapes": ours.adapter == theirs.adapter,
        },
    }
    differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    report["largest_loss_difference"] = round(max(differences), 4)
    alike = ours.steps == theirs.steps and max(differences) <= LOSS_TOLERANCE and ours.adapter == theirs.adapter
    if not alike or (expected is not None and report["tokens"] != dict(expected)):
        raise SystemExit(f"The two jobs did not do the same work: {json.dumps(report)}")
    return report


def refuse_other_rays() -> None:
    """Raises SystemExit where the pipeline would join a Ray that is there already, unless RAY_ADDRESS asks for it."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        return
    ray.shutdown()
    raise SystemExit("A Ray runs on this machine, and the job would join it instead of starting its own. Stop it first.")


def summarise(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Seconds, ratios within a round, and phases, as medians and ranges over the rounds."""
    seconds = {kind: [o.seconds for o in runs] for kind, runs in outcomes.items()}
    return {
        "seconds": {kind: spread(values) for kind, values in seconds.items()},
        "times_as_fast": {kind: ratios(seconds["trl"], seconds[kind]) for kind in ("cold", "warm")},
        "training_pairs_per_second": {kind: spread([o.pairs_per_second for o in runs]) for kind, runs in outcomes.items()},
        "phase_seconds": {
            kind: {phase: spread([o.phases[phase] for o in runs]) for phase in runs[0].phases}
            for kind, runs in outcomes.items()
        },
    }


def tables_of(report: Mapping[str, Any]) -> str:
    phases = report["phase_seconds"]

    def median_of(phase: str) -> Any:
        return lambda kind: f"{phases[kind][phase]['median']:.1f}" if phase in phases[kind] else "-"

    version = report["machine"]["versions"]["trl"]
    name = {"job": lambda kind: f"TRL {version}" if kind == "trl" else f"rayalign, {kind}"}
    whole = {
        "wall seconds": lambda kind: show(report["seconds"][kind]),
        "TRL's / its": lambda kind: show(report["times_as_fast"].get(kind)),
        "training alone, pairs/s": lambda kind: show(report["training_pairs_per_second"][kind]),
    }
    parts = {f"{phase}, s": median_of(phase) for phase in phases["cold"]}
    return f"{table(name | whole, KINDS)}\n\n{table(name | parts, KINDS)}"


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, output="job.json", rounds=1)
    parser.add_argument("--case", choices=RECORDS_CASES, default="small", help="the model and the responses' lengths")
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of whole epochs")
    parser.add_argument("--global_batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=2, help="rayalign's train workers; they share the cores")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs of rayalign's micro-batches, of each worker")
    parser.add_argument("--trl_batch_size", type=int, default=1, help="pairs of TRL's micro-batches")
    parser.add_argument("--trl_job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.trl_job:
        train_with_trl(json.loads(arguments.trl_job.read_text()))
        return
    names = ("pairs", "epochs", "steps", "global_batch_size", "trl_batch_size", "batch_size", "num_workers")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    refuse_other_rays()
    facts = machine_facts(threads=os.cpu_count() or 1)
    outcomes: dict[str, list[Outcome]] = {kind: [] for kind in KINDS}
    agreement: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        benchmark = Benchmark(Path(temporary), RECORDS_CASES[arguments.case], settings)
        for number in range(arguments.rounds):
            # The first job also reads its libraries from the disk; in a single round that is rayalign's.
            for kind in ("cold", "trl", "warm") if number % 2 == 0 else ("trl", "cold", "warm"):
                outcome = benchmark.trl(number) if kind == "trl" else benchmark.rayalign(number, kind)
                outcomes[kind].append(outcome)
            expected = None if settings.steps else benchmark.expected_tokens(number)
            for kind in ("cold", "warm"):
                agreement[kind] = check_alike(outcomes[kind][-1], outcomes["trl"][-1], expected)
    report = {
        "machine": facts,
        "job": {
            "case": arguments.case,
            "shape": asdict(RECORDS_CASES[arguments.case].shape),
            **asdict(settings),
            "cpus_per_worker": settings.cpus_per_worker,
            "rounds": arguments.rounds,
            "lora": {"rank": LORA_RANK, "target_modules": "ALL"},
            "learning_rate": LEARNING_RATE,
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "agreement": agreement,
        **summarise(outcomes),
    }
    write_json(arguments.output, report)
    print(tables_of(report))


if __name__ == "__main__":
    main()
